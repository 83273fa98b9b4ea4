// Products with float weights as they are stored, accumulated in float32 in one fixed order per output.
#pragma once
#include "cache.h"

namespace herd::HERD_ISA {

template <int KIND> inline float number(const uint8_t* p, int64_t i) {
    if constexpr (KIND == F32) return reinterpret_cast<const float*>(p)[i];
    if constexpr (KIND == F16) return half_to_float(reinterpret_cast<const uint16_t*>(p)[i]);
    const uint32_t bits = uint32_t(reinterpret_cast<const uint16_t*>(p)[i]) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

template <int KIND, int T>
void plain_tile(const uint8_t* w, const float* x, int64_t n, float* y, int64_t stride) {
    F a[T][4];
    for (int t = 0; t < T; ++t)
        for (int j = 0; j < 4; ++j) a[t][j] = V::zero();
    int64_t i = 0;
    for (; i + 4 * L <= n; i += 4 * L) {
        __builtin_prefetch(w + (i + 1024) * (KIND == F32 ? 4 : 2));
        for (int j = 0; j < 4; ++j) {
            const F e = element<KIND>(w, i + j * L);
            for (int t = 0; t < T; ++t) a[t][j] = V::fma(e, V::load(x + t * n + i + j * L), a[t][j]);
        }
    }
    for (; i + L <= n; i += L) {
        const F e = element<KIND>(w, i);
        for (int t = 0; t < T; ++t) a[t][0] = V::fma(e, V::load(x + t * n + i), a[t][0]);
    }
    for (int t = 0; t < T; ++t) {
        float s = V::sum(V::add(V::add(a[t][0], a[t][1]), V::add(a[t][2], a[t][3])));
        for (int64_t j = i; j < n; ++j) s += number<KIND>(w, j) * x[t * n + j];
        y[t * stride] = s;
    }
}

template <int KIND>
void plain_rows_of(const Matrix& m, int64_t first, int64_t last, const float* x, int64_t rows, float* y, int64_t stride) {
    for (int64_t r = first; r < last; ++r) {
        const uint8_t* w = m.data + r * m.cols * (KIND == F32 ? 4 : 2);
        float* out = y + (r - first);
        int64_t t = 0;
        for (; rows - t >= 4; t += 4) plain_tile<KIND, 4>(w, x + t * m.cols, m.cols, out + t * stride, stride);
        for (; rows - t >= 1; t += 1) plain_tile<KIND, 1>(w, x + t * m.cols, m.cols, out + t * stride, stride);
    }
}

// Rows [first, last) of m: y [rows, stride], the first of them at y.
inline void plain_rows(const Matrix& m, int64_t first, int64_t last, const float* x, int64_t rows, float* y, int64_t stride) {
    if (m.format == F32) return plain_rows_of<F32>(m, first, last, x, rows, y, stride);
    if (m.format == F16) return plain_rows_of<F16>(m, first, last, x, rows, y, stride);
    return plain_rows_of<BF16>(m, first, last, x, rows, y, stride);
}

}  // namespace herd::HERD_ISA
