// Products with float weights as they are stored, accumulated in float32 in one fixed order per output.
#pragma once
#include "abi.h"
#include "attention.h"

namespace herd::HERD_ISA {

template <int KIND, int T>
void plain_tile(const uint8_t* w, const float* const* x, int64_t n, float* const* y) {
    F a[T][4];
    for (int t = 0; t < T; ++t)
        for (int j = 0; j < 4; ++j) a[t][j] = V::zero();
    int64_t i = 0;
    for (; i + 4 * L <= n; i += 4 * L) {
        __builtin_prefetch(w + (i + 1024) * (KIND == FLOAT ? 4 : 2));
        for (int j = 0; j < 4; ++j) {
            const F e = element<KIND>(w, i + j * L);
            for (int t = 0; t < T; ++t) a[t][j] = V::fma(e, V::load(x[t] + i + j * L), a[t][j]);
        }
    }
    for (; i + L <= n; i += L) {
        const F e = element<KIND>(w, i);
        for (int t = 0; t < T; ++t) a[t][0] = V::fma(e, V::load(x[t] + i), a[t][0]);
    }
    for (int t = 0; t < T; ++t) {
        float s = V::sum(V::add(V::add(a[t][0], a[t][1]), V::add(a[t][2], a[t][3])));
        for (int64_t j = i; j < n; ++j) {
            float one;
            if constexpr (KIND == FLOAT) one = reinterpret_cast<const float*>(w)[j];
            else if constexpr (KIND == HALF) one = half_to_float(reinterpret_cast<const uint16_t*>(w)[j]);
            else { const uint32_t b = uint32_t(reinterpret_cast<const uint16_t*>(w)[j]) << 16; std::memcpy(&one, &b, 4); }
            s += one * x[t][j];
        }
        *y[t] = s;
    }
}

template <int KIND>
void plain_rows_of(const Matrix& m, int64_t first, int64_t last, const float* x, int64_t rows, float* y) {
    for (int64_t r = first; r < last; ++r) {
        const uint8_t* w = m.data + r * m.cols * (KIND == FLOAT ? 4 : 2);
        const float* in[4];
        float* out[4];
        int64_t t = 0;
        auto at = [&](int n) { for (int j = 0; j < n; ++j) { in[j] = x + (t + j) * m.cols; out[j] = y + (t + j) * m.rows + r; } };
        for (; rows - t >= 4; t += 4) { at(4); plain_tile<KIND, 4>(w, in, m.cols, out); }
        for (; rows - t >= 1; t += 1) { at(1); plain_tile<KIND, 1>(w, in, m.cols, out); }
    }
}

inline void plain_rows(const Matrix& m, int64_t first, int64_t last, const float* x, int64_t rows, float* y) {
    if (m.format == F32) return plain_rows_of<FLOAT>(m, first, last, x, rows, y);
    if (m.format == F16) return plain_rows_of<HALF>(m, first, last, x, rows, y);
    return plain_rows_of<BRAIN>(m, first, last, x, rows, y);
}

}  // namespace herd::HERD_ISA
