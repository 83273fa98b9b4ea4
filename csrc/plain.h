// Products with float weights as they are stored: rows of the matrix times rows of inputs, both read from front to back.
//
// Every output is one chain of L lanes (pairs of columns per lane where the processor multiplies bfloat16 itself), summed across
// at the end: the same additions in the same order, however many rows and tokens are computed beside it. So a tile may have any
// shape, and nothing has to be packed: weights stay where the file is mapped.
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
        if (from == n) return sum;
        alignas(64) uint8_t last[STEP * WIDTH] = {};
        std::memcpy(last, w + from * WIDTH, (n - from) * WIDTH);
        return sum + V::sum(add(V::zero(), weight(last), input(x + from * INPUT)));
    }
};
#endif

// R rows of weights from w, T rows of inputs from x. AHEAD: the next R rows are fetched meanwhile, line by line as they lie in
// memory; the processor's own prefetching stops at every page, which is a row.
template <typename P, int R, int T, bool AHEAD>
void plain_tile(const uint8_t* w, int64_t n, const uint8_t* x, int64_t x_stride, float* y, int64_t stride) {
    const int64_t w_stride = n * P::WIDTH;
    const uint8_t* next = w + R * w_stride;
    constexpr int N = R * T, WHOLE = (N + L - 1) / L * L;
    F a[WHOLE];
    for (int j = 0; j < WHOLE; ++j) a[j] = V::zero();
    int64_t i = 0;
    for (; i + P::STEP <= n; i += P::STEP) {
        typename P::W e[R];
        for (int r = 0; r < R; ++r) e[r] = P::weight(w + r * w_stride + i * P::WIDTH);
        if constexpr (AHEAD) {
            constexpr int BYTES = R * P::STEP * P::WIDTH;
            for (int b = 0; b < (BYTES < 64 ? 64 : BYTES); b += 64) __builtin_prefetch(next + b, 0, 2);
            next += BYTES;
        }
        for (int t = 0; t < T; ++t) {
            const typename P::X f = P::input(x + t * x_stride + i * P::INPUT);
            for (int r = 0; r < R; ++r) a[t * R + r] = P::add(a[t * R + r], e[r], f);
        }
    }
    alignas(64) float sum[WHOLE];
    for (int j = 0; j < WHOLE; j += L) V::store(sum + j, V::sums(a + j));
    for (int j = 0; j < N; ++j) y[j / R * stride + j % R] = P::rest(sum[j], w + j % R * w_stride, x + j / R * x_stride, i, n);
}

// R rows of weights for tokens [0, rows), as many as registers hold at a time. Later tiles find the weights in the cache.
template <typename P, int R, int T, bool AHEAD = true>
void plain_tokens(const uint8_t* w, int64_t n, const uint8_t* x, int64_t x_stride, int64_t rows, float* y, int64_t stride) {
    if (rows >= T) {
        plain_tile<P, R, T, AHEAD>(w, n, x, x_stride, y, stride);
        for (rows -= T; rows >= T; rows -= T) {
            x += T * x_stride;
            y += T * stride;
            plain_tile<P, R, T, false>(w, n, x, x_stride, y, stride);
        }
        x += T * x_stride;
        y += T * stride;
        if constexpr (T > 1) plain_tokens<P, R, T - 1, false>(w, n, x, x_stride, rows, y, stride);
    } else if constexpr (T > 1) {
        plain_tokens<P, R, T - 1, AHEAD>(w, n, x, x_stride, rows, y, stride);
    }
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
