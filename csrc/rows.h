// What happens to rows between matrix products: norms, quantization, rotation, the gate. All rows are independent.
#pragma once
#include "panel.h"
#include <cmath>

namespace herd::HERD_ISA {

constexpr int L = V::LANES;

// e^x, relative error below 2e-7 (Cephes' polynomial), 0 below -87.
inline F exponential(F x) {
    x = V::max(x, V::set(-87.3f));
    const F n = V::nearest(V::mul(x, V::set(1.44269504088896341f)));
    F r = V::fnma(n, V::set(0.693359375f), x);
    r = V::fnma(n, V::set(-2.12194440e-4f), r);
    F p = V::set(1.9875691500e-4f);
    p = V::fma(p, r, V::set(1.3981999507e-3f));
    p = V::fma(p, r, V::set(8.3334519073e-3f));
    p = V::fma(p, r, V::set(4.1665795894e-2f));
    p = V::fma(p, r, V::set(1.6666665459e-1f));
    p = V::fma(p, r, V::set(5.0000001201e-1f));
    p = V::fma(V::mul(p, r), r, V::add(r, V::set(1.0f)));
    return V::scale(p, n);
}

// Sum of squares in float64 partials would be exacter; four float chains of fixed order are within 1e-6 and as fast as memory.
inline float mean_square(const float* x, int64_t n) {
    F a[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    int64_t i = 0;
    for (; i + 4 * L <= n; i += 4 * L)
        for (int j = 0; j < 4; ++j) { const F v = V::load(x + i + j * L); a[j] = V::fma(v, v, a[j]); }
    float s = V::sum(V::add(V::add(a[0], a[1]), V::add(a[2], a[3])));
    for (; i < n; ++i) s += x[i] * x[i];
    return s / float(n);
}

inline void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
    const float r = 1.0f / std::sqrt(mean_square(x, n) + eps);
    int64_t i = 0;
    for (; i + L <= n; i += L) V::store(y + i, V::mul(V::mul(V::load(x + i), V::set(r)), V::load(weight + i)));
    for (; i < n; ++i) y[i] = x[i] * r * weight[i];
}

// One row [n], n a multiple of GROUP: q = round(x / scale), scale = largest magnitude of ACT_GROUP columns / 127.
inline void quantize(const float* x, int64_t n, int8_t* q, float* scale, int32_t* sum) {
    for (int64_t g = 0; g < n; g += ACT_GROUP) {
        const int64_t end = g + ACT_GROUP < n ? g + ACT_GROUP : n;
        F m = V::zero();
        for (int64_t i = g; i < end; i += L) m = V::max(m, V::abs(V::load(x + i)));
        const float top = V::top(m);
        const float inverse = top > 0 ? 127.0f / top : 0.0f;
        scale[g / ACT_GROUP] = top / 127.0f;
        for (int64_t i = g; i < end; i += L) V::round8(x + i, inverse, q + i);
        for (int64_t i = g; i < end; i += SUM_GROUP) {
            int32_t s = 0;
            for (int j = 0; j < SUM_GROUP; ++j) s += q[i + j];
            sum[i / SUM_GROUP] = s;
        }
    }
}

// a = silu(a) * b
inline void gate(float* a, const float* b, int64_t n) {
    int64_t i = 0;
    for (; i + L <= n; i += L) {
        const F x = V::load(a + i);
        V::store(a + i, V::mul(V::div(x, V::add(V::set(1.0f), exponential(V::sub(V::zero(), x)))), V::load(b + i)));
    }
    for (; i < n; ++i) a[i] = a[i] / (1.0f + std::exp(-a[i])) * b[i];
}

// Turn neighbouring pairs of one head.
inline void rotate(float* x, const float* cos, const float* sin, int64_t head_dim) {
    for (int64_t i = 0; i < head_dim / 2; ++i) {
        const float even = x[2 * i], odd = x[2 * i + 1];
        x[2 * i] = even * cos[i] - odd * sin[i];
        x[2 * i + 1] = even * sin[i] + odd * cos[i];
    }
}

}  // namespace herd::HERD_ISA
