// A product on its own: the output layer, and layers that are run one by one.
#pragma once
#include "product.h"

namespace herd::HERD_ISA {

// y [rows, m.rows] = x [rows, m.cols] @ m^T
inline void matmul(const Matrix& m, const float* x, int64_t rows, float* y, int threads) {
    static thread_local struct {
        std::vector<int8_t> int8;
        std::vector<float> scale;
        std::vector<int32_t> sum;
    } b;
    const Acts shape{nullptr, nullptr, nullptr, m.cols};
    if (quantized(m)) {
        b.int8.resize(rows * m.cols);
        b.scale.resize(rows * shape.scales());
        b.sum.resize(rows * shape.sums());
    }
    const Inputs in{x, {b.int8.data(), b.scale.data(), b.sum.data(), m.cols}};
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> spare;
        #pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            if (quantized(m))
                quantize(x + r * m.cols, m.cols, b.int8.data() + r * m.cols, b.scale.data() + r * shape.scales(), b.sum.data() + r * shape.sums());
        }
        #pragma omp for schedule(static)
        for (int64_t p = 0; p < panels(m); ++p) product(m, p, in, rows, y, spare);
    }
}

}  // namespace herd::HERD_ISA
