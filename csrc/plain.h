// Products with float weights as they are stored: rows of the matrix times rows of inputs, both read from front to back.
//
// Every output is one chain of L lanes (pairs of columns per lane where the processor multiplies bfloat16 itself), summed across
// at the end: the same additions in the same order, however many rows and tokens are computed beside it. So a tile may have any
// shape, and nothing has to be packed: weights stay where the file is mapped.
#pragma once
#include "cache.h"

namespace herd::HERD_ISA {

constexpr int64_t SHORT = 32 << 10;  // bytes that rows side by side may span before the processor loses track of them

template <int KIND> inline float number(const uint8_t* p, int64_t i) {
    if constexpr (KIND == F32) return reinterpret_cast<const float*>(p)[i];
    if constexpr (KIND == F16) return half_to_float(reinterpret_cast<const uint16_t*>(p)[i]);
    const uint32_t bits = uint32_t(reinterpret_cast<const uint16_t*>(p)[i]) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Inputs as float32; weights are widened, which is exact.
template <int KIND> struct Widened {
    static constexpr int WIDTH = KIND == F32 ? 4 : 2, STEP = L;
    using W = F;
    using X = F;
    static W weight(const uint8_t* p) { return element<KIND>(p, 0); }
    static X input(const uint8_t* p) { return V::load(reinterpret_cast<const float*>(p)); }
    static constexpr int INPUT = 4;
    static F add(F a, W w, X x) { return V::fma(w, x, a); }
    static float rest(float sum, const uint8_t* w, const uint8_t* x, int64_t from, int64_t n) {
        for (int64_t i = from; i < n; ++i) sum += number<KIND>(w, i) * reinterpret_cast<const float*>(x)[i];
        return sum;
    }
};

#ifdef HERD_BRAINS
// Both bfloat16: each lane adds two products at a time. Inputs are records filled up with zeros (round_row in rows.h).
struct Paired {
    static constexpr int WIDTH = 2, STEP = 2 * L, INPUT = 2;
    using W = V::B;
    using X = V::B;
    static W weight(const uint8_t* p) { return V::pairs(p); }
    static X input(const uint8_t* p) { return V::pairs(p); }
    static F add(F a, W w, X x) { return V::dot_pairs(a, w, x); }
    static float rest(float sum, const uint8_t* w, const uint8_t* x, int64_t from, int64_t n) {
        alignas(64) uint8_t last[STEP * WIDTH] = {};
        std::memcpy(last, w + from * WIDTH, (n - from) * WIDTH);
        return sum + V::sum(add(V::zero(), weight(last), input(x + from * INPUT)));
    }
};
#endif

// R rows of weights from w, T rows of inputs from x. Meanwhile FETCH rows of later weights at `later` are fetched, line by line as
// they lie in memory: the processor's own prefetching stops at every page, which is a row.
template <typename P, int R, int T, int FETCH>
void plain_tile(const uint8_t* w, const uint8_t* later, int64_t n, const uint8_t* x, int64_t x_stride, float* y, int64_t stride) {
    const int64_t w_stride = n * P::WIDTH;
    constexpr int N = R * T, WHOLE = (N + L - 1) / L * L;
    F a[WHOLE];
    for (int j = 0; j < WHOLE; ++j) a[j] = V::zero();
    int64_t i = 0;
    for (; i + P::STEP <= n; i += P::STEP) {
        typename P::W e[T > 1 ? R : 1];
        if constexpr (T > 1)
            for (int r = 0; r < R; ++r) e[r] = P::weight(w + r * w_stride + i * P::WIDTH);
        if constexpr (FETCH > 0) {
            constexpr int BYTES = FETCH * P::STEP * P::WIDTH;
            for (int b = 0; b < (BYTES < 64 ? 64 : BYTES); b += 64) __builtin_prefetch(later + b, 0, 2);
            later += BYTES;
        }
        for (int t = 0; t < T; ++t) {
            const typename P::X f = P::input(x + t * x_stride + i * P::INPUT);
            for (int r = 0; r < R; ++r) a[t * R + r] = P::add(a[t * R + r], T > 1 ? e[T > 1 ? r : 0] : P::weight(w + r * w_stride + i * P::WIDTH), f);
        }
    }
    alignas(64) float sum[WHOLE];
    for (int j = 0; j < WHOLE; j += L) V::store(sum + j, V::sums(a + j));
    if (i < n)
        for (int j = 0; j < N; ++j) sum[j] = P::rest(sum[j], w + j % R * w_stride, x + j / R * x_stride, i, n);
    for (int t = 0; t < T; ++t) std::memcpy(y + t * stride, sum + t * R, R * sizeof(float));
}

// R rows of weights for the last tokens, fewer than T.
template <typename P, int R, int T, int FETCH>
void plain_last(const uint8_t* w, const uint8_t* later, int64_t n, const uint8_t* x, int64_t x_stride, int64_t rows, float* y, int64_t stride) {
    if constexpr (T > 1) {
        if (rows == T - 1) return plain_tile<P, R, T - 1, FETCH>(w, later, n, x, x_stride, y, stride);
        plain_last<P, R, T - 1, FETCH>(w, later, n, x, x_stride, rows, y, stride);
    }
}

// R rows of weights for tokens [0, rows), T at a time, who find them in the cache from the second time on. The next R rows are fetched
// during the first tile, or, where there are many, a row during each: too many requests at once would hold up what is needed now.
template <typename P, int R, int T>
void plain_tokens(const uint8_t* w, int64_t n, const uint8_t* x, int64_t x_stride, int64_t rows, float* y, int64_t stride) {
    const int64_t row = n * P::WIDTH;
    const uint8_t* later = w + R * row;
    if (rows < T) return plain_last<P, R, T, R>(w, later, n, x, x_stride, rows, y, stride);
    int64_t t = 0;
    if (rows < R * T) {
        plain_tile<P, R, T, R>(w, later, n, x, x_stride, y, stride);
        t = T;
    } else {
        for (int r = 0; r < R; ++r, t += T)
            plain_tile<P, R, T, 1>(w, later + r * row, n, x + t * x_stride, x_stride, y + t * stride, stride);
    }
    for (; rows - t >= T; t += T) plain_tile<P, R, T, 0>(w, w, n, x + t * x_stride, x_stride, y + t * stride, stride);
    plain_last<P, R, T, 0>(w, w, n, x + t * x_stride, x_stride, rows - t, y + t * stride, stride);
}

template <typename P>
void plain_rows_of(const Matrix& m, int64_t first, int64_t last, const uint8_t* x, int64_t x_stride, int64_t rows, float* y, int64_t stride) {
    constexpr int R = L == 8 ? 2 : 4, T = L == 8 ? 5 : 6;  // AVX2 has 16 registers, the others 32
    const int64_t row = m.cols * P::WIDTH;
    const uint8_t* w = m.data + first * row;
    int64_t r = first;
    auto go = [&]<int N, int M>() {
        for (; last - r >= N; r += N, w += N * row, y += N) plain_tokens<P, N, M>(w, m.cols, x, x_stride, rows, y, stride);
    };
    // One row at a time would wait for its own additions; where rows are short, summing across costs as much as the products, and is
    // done for a whole vector of them.
    constexpr int MANY = L > 4 ? L : 4;
    if (rows == 1 && MANY * row <= SHORT) go.template operator()<MANY, 1>();
    if (rows == 1) go.template operator()<4, 1>();
    go.template operator()<R, T>();
    go.template operator()<1, T>();
}

// Rows [first, last) of m: y [rows, stride], the first of them at y.
inline void plain_rows(const Matrix& m, int64_t first, int64_t last, const float* x, int64_t rows, float* y, int64_t stride) {
    const uint8_t* in = reinterpret_cast<const uint8_t*>(x);
    const int64_t x_stride = m.cols * 4;
    if (m.format == F32) return plain_rows_of<Widened<F32>>(m, first, last, in, x_stride, rows, y, stride);
    if (m.format == F16) return plain_rows_of<Widened<F16>>(m, first, last, in, x_stride, rows, y, stride);
    return plain_rows_of<Widened<BF16>>(m, first, last, in, x_stride, rows, y, stride);
}

}  // namespace herd::HERD_ISA
