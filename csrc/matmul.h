// A product on its own: the output layer, and layers that are run one by one.
#pragma once
#include "product.h"

namespace herd::HERD_ISA {

// y [rows, m.rows] = x [rows, m.cols] @ m^T
inline void matmul(const Matrix& m, const float* x, int64_t rows, float* y, const MatmulBuffers& b) {
    const Acts acts = shaped(b.acts, m.cols);
    const Inputs in{x, acts};
    #pragma omp parallel num_threads(b.threads)
    {
        float* spare = b.spare + thread_number() * b.spare_floats;
        if (quantized(m)) {
            #pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; ++r) quantize(x + r * m.cols, acts, r, 0, m.cols);
        }
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < pieces(acts, rows) * panels(m); ++i) product_piece(m, i, in, rows, y, spare);
    }
}

}  // namespace herd::HERD_ISA
