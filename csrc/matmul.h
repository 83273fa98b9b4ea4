// A product on its own: the output layer, and layers that are run one by one.
#pragma once
#include "product.h"

namespace herd::HERD_ISA {

// y [rows, m.rows] = x [rows, m.cols] @ m^T
inline void matmul(const Matrix& m, const float* x, int64_t rows, float* y, const MatmulBuffers& b) {
    const Acts acts = shaped(b.acts, m.cols);
    const Inputs in{x, acts, form_of(m)};
    #pragma omp parallel num_threads(int(b.team.threads))
    {
        Crew crew(b.team, thread_number());
        float* spare = b.spare + thread_number() * b.spare_floats;
        if (in.form != FLOATS) crew.share(rows, [&](int64_t r) { take_row(in.form, x + r * m.cols, acts, r, 0, m.cols); });
        product_of(crew, m, in, rows, y, spare);
    }
}

// y [rows, output.rows] = norm(x[index]) @ output^T
inline void head(const Head& h, const float* x, const int64_t* index, int64_t rows, float* y, const MatmulBuffers& b) {
    const Matrix& m = h.output;
    const Acts acts = shaped(b.acts, m.cols);
    const Inputs in{b.normed, acts, form_of(m)};
    #pragma omp parallel num_threads(int(b.team.threads))
    {
        Crew crew(b.team, thread_number());
        float* spare = b.spare + thread_number() * b.spare_floats;
        crew.share(rows, [&](int64_t r) {
            float* row = b.normed + r * m.cols;
            rms_norm(x + index[r] * m.cols, h.norm, m.cols, float(h.norm_eps), row);
            take_row(in.form, row, acts, r, 0, m.cols);
        });
        product_of(crew, m, in, rows, y, spare);
    }
}

}  // namespace herd::HERD_ISA
