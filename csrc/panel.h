// y[t, rows of a panel] = sum over columns of weight * activation, for a tile of T tokens.
//
// Every output is one chain of float additions in column order, whatever T is: a token's result does not depend on which
// tokens are computed beside it. Integer sums are exact, so they may be split freely.
#pragma once
#include <cstring>
#include "scratch.h"

namespace herd::HERD_ISA {

using F = V::F;
using I = V::I;
constexpr int PARTS = PANEL / V::LANES;

inline I low(I c) { return V::both(c, 0x0f0f0f0f); }
inline I high(I c) { return V::both(V::template right<4>(c), 0x0f0f0f0f); }
inline I chunk(const uint8_t* p, int c, int part) { return V::words(p + c * 64 + part * V::LANES * 4); }

// Each format: SCALES per group, ZERO of its numbers, whether it subtracts a minimum, and its parts for step k (4 columns).
template <int FORMAT> struct Fmt;

template <> struct Fmt<Q4_0> {
    static constexpr int SCALES = 1, ZERO = 8;
    static constexpr bool MINIMUM = false;
    static F scale(const uint8_t*, const uint8_t* g, int part, int) { return V::halves(g + part * V::LANES * 2); }
    static F minimum(const uint8_t*, const uint8_t*, int) { return V::zero(); }
    template <int k> static I numbers(const uint8_t* g, int part) {
        const I c = chunk(g + 32, k & 3, part);
        return k < 4 ? low(c) : high(c);
    }
};

template <> struct Fmt<Q8_0> {
    static constexpr int SCALES = 1, ZERO = V::SIGNED8 ? 0 : 128;
    static constexpr bool MINIMUM = false;
    static F scale(const uint8_t*, const uint8_t* g, int part, int) { return V::halves(g + part * V::LANES * 2); }
    static F minimum(const uint8_t*, const uint8_t*, int) { return V::zero(); }
    template <int k> static I numbers(const uint8_t* g, int part) { return V::flip(chunk(g + 32, k, part)); }
};

template <> struct Fmt<Q4_K> {
    static constexpr int SCALES = 1, ZERO = 0;
    static constexpr bool MINIMUM = true;
    static F scale(const uint8_t* h, const uint8_t* g, int part, int) {
        return V::mul(V::halves(h + part * V::LANES * 2), V::bytes(g + part * V::LANES));
    }
    static F minimum(const uint8_t* h, const uint8_t* g, int part) {
        return V::mul(V::halves(h + 32 + part * V::LANES * 2), V::bytes(g + 16 + part * V::LANES));
    }
    template <int k> static I numbers(const uint8_t* g, int part) {
        const I c = chunk(g + 32, k & 3, part);
        return k < 4 ? low(c) : high(c);
    }
};

template <> struct Fmt<Q5_K> : Fmt<Q4_K> {
    template <int k> static I numbers(const uint8_t* g, int part) {
        const I h = chunk(g + 32 + 256, 0, part);  // byte b, bit k: the fifth bit of column 4k + b
        const I bit = k < 4 ? V::template left<(k < 4 ? 4 - k : 0)>(h) : V::template right<(k < 4 ? 0 : k - 4)>(h);
        return V::either(Fmt<Q4_K>::numbers<k>(g, part), V::both(bit, 0x10101010));
    }
};

template <> struct Fmt<Q6_K> {
    static constexpr int SCALES = 2, ZERO = 32;
    static constexpr bool MINIMUM = false;
    static F scale(const uint8_t* h, const uint8_t* g, int part, int half) {
        return V::mul(V::halves(h + part * V::LANES * 2), V::signed_bytes(g + 16 * half + part * V::LANES));
    }
    static F minimum(const uint8_t*, const uint8_t*, int) { return V::zero(); }
    template <int k> static I numbers(const uint8_t* g, int part) {
        const I c = chunk(g + 32, k & 3, part);
        const I h = chunk(g + 32 + 256, k >> 2, part);  // byte b, bits 2j and 2j + 1: column 4 (4 (k / 4) + j) + b
        constexpr int j = k & 3;
        const I top = j < 2 ? V::template left<(j < 2 ? 4 - 2 * j : 0)>(h) : V::template right<(j < 2 ? 0 : 2 * j - 4)>(h);
        return V::either(k < 4 ? low(c) : high(c), V::both(top, 0x30303030));
    }
};

inline int32_t four(const int8_t* p) { int32_t x; std::memcpy(&x, p, 4); return x; }

template <int FORMAT, int T, int k, int END>
inline void steps(const uint8_t* g, int part, const int8_t* const* x, int64_t column, I (&acc)[T][2]) {
    if constexpr (k < END) {
        const I w = Fmt<FORMAT>::template numbers<k>(g, part);
        for (int t = 0; t < T; ++t) {
            I& a = acc[t][T <= 2 ? k & 1 : 0];  // few tokens: two chains, so that one does not wait for the other
            a = V::dot(a, w, four(x[t] + column + 4 * k));
        }
        steps<FORMAT, T, k + 1, END>(g, part, x, column, acc);
    }
}

template <int FORMAT, int T>
void tile(const uint8_t* w, const Acts& a, int64_t first, float* y, int64_t stride) {
    using Form = Fmt<FORMAT>;
    constexpr Layout l = layout(FORMAT);
    constexpr int groups = l.columns / GROUP;
    const int8_t* x[T];
    const float* scales[T];
    const int32_t* sums[T];
    for (int t = 0; t < T; ++t) {
        x[t] = a.q + (first + t) * a.columns;
        scales[t] = a.scale + (first + t) * a.scales;
        sums[t] = a.sum + (first + t) * a.sums;
    }
    F total[T][PARTS], run[T][PARTS];
    for (int t = 0; t < T; ++t)
        for (int p = 0; p < PARTS; ++p) total[t][p] = run[t][p] = V::zero();
    const uint8_t* head = w;
    const uint8_t* g = w + l.head;
    for (int64_t column = 0, n = 0; column < a.columns; column += GROUP) {
        if constexpr (FORMAT == Q4_0 || FORMAT == Q8_0) __builtin_prefetch(g + 2048);
        for (int p = 0; p < PARTS; ++p) {
            for (int half = 0; half < Form::SCALES; ++half) {
                I acc[T][2];
                for (int t = 0; t < T; ++t) {
                    int32_t offset = 0;
                    if constexpr (Form::ZERO != 0) {
                        const int32_t* s = sums[t] + column / SUM_GROUP;
                        offset = -Form::ZERO * (Form::SCALES == 2 ? s[half] : s[0] + s[1]);
                    }
                    acc[t][0] = V::ints(offset);
                    if constexpr (T <= 2) acc[t][1] = V::ints(0);
                }
                if constexpr (Form::SCALES == 1) {
                    steps<FORMAT, T, 0, 8>(g, p, x, column, acc);
                } else if (half == 0) {
                    steps<FORMAT, T, 0, 4>(g, p, x, column, acc);
                } else {
                    steps<FORMAT, T, 4, 8>(g, p, x, column, acc);
                }
                const F s = Form::scale(head, g, p, half);
                for (int t = 0; t < T; ++t) {
                    const I whole = T <= 2 ? V::plus(acc[t][0], acc[t][1]) : acc[t][0];
                    run[t][p] = V::fma(V::floats(whole), s, run[t][p]);
                }
            }
            if constexpr (Form::MINIMUM) {
                const F m = Form::minimum(head, g, p);
                for (int t = 0; t < T; ++t) {
                    const int32_t* s = sums[t] + column / SUM_GROUP;
                    run[t][p] = V::fnma(m, V::set(float(s[0] + s[1])), run[t][p]);
                }
            }
        }
        g += l.body;
        if (groups > 1 && ++n == groups) { n = 0; head = g; g += l.head; }
        if ((column + GROUP) % ACT_GROUP == 0 || column + GROUP == a.columns) {
            for (int t = 0; t < T; ++t) {
                const F s = V::set(scales[t][column / ACT_GROUP]);
                for (int p = 0; p < PARTS; ++p) {
                    total[t][p] = V::fma(run[t][p], s, total[t][p]);
                    run[t][p] = V::zero();
                }
            }
        }
    }
    for (int t = 0; t < T; ++t)
        for (int p = 0; p < PARTS; ++p) V::store(y + (first + t) * stride + p * V::LANES, total[t][p]);
}

// One panel for tokens [first, last): y [M, stride], the panel's 16 columns of it.
template <int FORMAT>
void panel(const uint8_t* w, const Acts& a, int64_t first, int64_t last, float* y, int64_t stride) {
    int64_t t = first;
    for (; last - t >= 12; t += 12) tile<FORMAT, 12>(w, a, t, y, stride);
    if (last - t >= 8) { tile<FORMAT, 8>(w, a, t, y, stride); t += 8; }
    if (last - t >= 4) { tile<FORMAT, 4>(w, a, t, y, stride); t += 4; }
    if (last - t >= 2) { tile<FORMAT, 2>(w, a, t, y, stride); t += 2; }
    if (last - t >= 1) tile<FORMAT, 1>(w, a, t, y, stride);
}

}  // namespace herd::HERD_ISA
