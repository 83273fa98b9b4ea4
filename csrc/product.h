// One panel of a product, whatever the weight is stored as, and the forms its inputs must have.
#pragma once
#include <algorithm>
#include <vector>
#include "abi.h"
#include "plain.h"

namespace herd::HERD_ISA {

inline bool quantized(const Matrix& m) { return m.format != F32 && m.format != F16 && m.format != BF16; }

inline int64_t panels(const Matrix& m) { return (m.rows + PANEL - 1) / PANEL; }


// Activations of a product in both forms; `q` is only filled when a matrix that reads them is quantized.
struct Inputs {
    const float* x;
    Acts acts;
    Inputs from(int64_t row) const {
        const int64_t n = acts.columns;
        const Acts a{acts.q + row * n, acts.scale + row * acts.scales(), acts.sum + row * acts.sums(), n};
        return {x + row * n, a};
    }
};


inline void panel_any(int64_t format, const uint8_t* w, const Acts& a, int64_t rows, float* y, int64_t stride) {
    switch (format) {
        case Q4_0: return panel<Q4_0>(w, a, 0, rows, y, stride);
        case Q8_0: return panel<Q8_0>(w, a, 0, rows, y, stride);
        case Q4_K: return panel<Q4_K>(w, a, 0, rows, y, stride);
        case Q5_K: return panel<Q5_K>(w, a, 0, rows, y, stride);
        case Q6_K: return panel<Q6_K>(w, a, 0, rows, y, stride);
    }
}

// Panel `p` of y [rows, m.rows] = inputs [rows, m.cols] @ m^T.
inline void product(const Matrix& m, int64_t p, const Inputs& in, int64_t rows, float* y, std::vector<float>& spare) {
    const int64_t first = p * PANEL, n = std::min<int64_t>(PANEL, m.rows - first);
    if (!quantized(m)) return plain_rows(m, first, first + n, in.x, rows, y);
    const uint8_t* w = m.data + p * panel_bytes(int(m.format), m.cols);
    if (n == PANEL) return panel_any(m.format, w, in.acts, rows, y + first, m.rows);
    spare.resize(rows * PANEL);
    panel_any(m.format, w, in.acts, rows, spare.data(), PANEL);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(spare.data() + r * PANEL, n, y + r * m.rows + first);
}

}  // namespace herd::HERD_ISA
