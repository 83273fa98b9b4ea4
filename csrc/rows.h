// What happens to rows between matrix products: norms, quantization, rotation, the gate. All rows are independent.
#pragma once
#include "panel.h"

namespace herd::HERD_ISA {

constexpr int L = V::LANES;

inline float root(float x) { return __builtin_sqrtf(x); }

// e^x, relative error below 2e-7 (Cephes' polynomial), held between e^-87.3 and e^88.3, the ends of what float32 can scale by.
// NaN stays NaN: with one among their operands, max and min give the second.
inline F exponential(F x) {
    x = V::min(V::set(88.3f), V::max(V::set(-87.3f), x));
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

// Four chains of 16 lanes keep the error of the sum near 1e-7 of it; their order is fixed.
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
    const float r = 1.0f / root(mean_square(x, n) + eps);
    int64_t i = 0;
    for (; i + L <= n; i += L) V::store(y + i, V::mul(V::mul(V::load(x + i), V::set(r)), V::load(weight + i)));
    for (; i < n; ++i) y[i] = x[i] * r * weight[i];
}

// The largest magnitude of x [n], or NaN where one is no finite number.
inline float magnitude(const float* x, int64_t n) {
    F m = V::zero(), spoilt = V::zero();
    for (int64_t i = 0; i < n; i += L) {
        const F v = V::load(x + i);
        m = V::max(m, V::abs(v));
        spoilt = V::fma(v, V::zero(), spoilt);  // NaN and infinity times zero are NaN, and stay it
    }
    return V::top(m) + V::sum(spoilt);
}

// x [n] -> round(x / scale) in -127 .. 127; returns the scale. One value that is no finite number makes the scale NaN: what is
// computed from it must not look like an answer. The scale is a normal number always, so that its inverse is finite.
inline float to_bytes(const float* x, int64_t n, int8_t* q) {
    constexpr float LEAST = 127.0f * 1.17549435e-38f;
    float top = magnitude(x, n);
    if (top != top) {
        std::memset(q, 0, n);
        return top;
    }
    if (top < LEAST) top = LEAST;
    const float inverse = 127.0f / top;
    for (int64_t i = 0; i < n; i += L) V::round8(x + i, inverse, q + i);
    return top / 127.0f;
}

// Columns [begin, begin + n) of row `row` of a; begin is a multiple of ACT_GROUP, n of GROUP, and x points at the first of them.
inline void quantize(const float* x, const Acts& a, int64_t row, int64_t begin, int64_t n) {
    uint8_t* record = a.data + row * a.stride + begin / GROUP * RECORD;
    for (int64_t at = 0; at < n; at += ACT_GROUP) {
        const int64_t width = n - at < ACT_GROUP ? n - at : ACT_GROUP;
        int8_t q[ACT_GROUP];
        const float scale = to_bytes(x + at, width, q);
        for (int64_t i = 0; i < width; i += GROUP, record += RECORD) {
            int32_t half[2] = {0, 0};  // two loops, each of one vector
            for (int j = 0; j < SUM_GROUP; ++j) half[0] += q[i + j];
            for (int j = SUM_GROUP; j < GROUP; ++j) half[1] += q[i + j];
            const int32_t sum = half[0] + half[1];
            const int32_t offsets[4] = {-8 * sum, -128 * sum, -32 * half[0], -32 * half[1]};
            const float floats[2] = {float(sum), scale};
            std::memcpy(record, q + i, GROUP);
            std::memcpy(record + REC_8, offsets, sizeof offsets);
            std::memcpy(record + REC_SUM, floats, sizeof floats);
        }
    }
}

// The same columns as bfloat16, in the place of records, which are as long; zeros to the end of the last one.
inline void round_row(const float* x, const Acts& a, int64_t row, int64_t begin, int64_t n) {
    uint16_t* to = reinterpret_cast<uint16_t*>(a.data + row * a.stride) + begin;
    int64_t i = 0;
    for (; i + L <= n; i += L) V::store_brains(to + i, V::load(x + i));
    if (i == n && n % GROUP == 0) return;
    float rest[GROUP] = {};
    std::memcpy(rest, x + i, (n - i) * sizeof(float));
    for (int64_t j = 0; j < (n + GROUP - 1) / GROUP * GROUP - i; j += L) V::store_brains(to + i + j, V::load(rest + j));
}

// What a matrix reads its inputs as.
enum Form { FLOATS, BYTES, BRAINS };

// Columns [begin, begin + n) of a row in the form that its readers want, beside the floats themselves.
inline void take_row(Form form, const float* x, const Acts& a, int64_t row, int64_t begin, int64_t n) {
    if (form == BYTES) quantize(x, a, row, begin, n);
    if (form == BRAINS) round_row(x, a, row, begin, n);
}

// a = silu(a) * b
inline void gate(float* a, const float* b, int64_t n) {
    int64_t i = 0;
    for (; i + L <= n; i += L) {
        const F x = V::load(a + i);
        V::store(a + i, V::mul(V::div(x, V::add(V::set(1.0f), exponential(V::sub(V::zero(), x)))), V::load(b + i)));
    }
    for (; i < n; ++i) a[i] = a[i] / (1.0f + __builtin_expf(-a[i])) * b[i];
}

// Turns neighbouring pairs of one head.
inline void rotate(float* x, const float* cos, const float* sin, int64_t head_dim) {
    for (int64_t i = 0; i < head_dim / 2; ++i) {
        const float even = x[2 * i], odd = x[2 * i + 1];
        x[2 * i] = even * cos[i] - odd * sin[i];
        x[2 * i + 1] = even * sin[i] + odd * cos[i];
    }
}

}  // namespace herd::HERD_ISA
