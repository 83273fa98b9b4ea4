// y[t, rows of a panel] = sum over columns of weight * activation, for a tile of T tokens.
//
// Every output is one chain of float additions in column order, whatever T is: a token's result does not depend on which
// tokens are computed beside it. Integer sums are exact, so they may be split freely.
#pragma once
#include <cstring>
#include "scratch.h"
#ifdef HERD_TILES
#include "tiles.h"
#endif

// The parts of a tile share its registers: as functions of their own, which is what a compiler may make of so many of them, they
// would pass everything through memory.
#define HERD_INLINE __attribute__((always_inline)) inline

namespace herd::HERD_ISA {

using F = V::F;
using I = V::I;
constexpr int PARTS = PANEL / V::LANES;
constexpr int AHEAD = 9216;  // bytes: weights come from memory while those before them are multiplied
constexpr int SECOND_LEVEL = 2;

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

inline int32_t four(const uint8_t* p) { int32_t x; std::memcpy(&x, p, 4); return x; }
inline F float_at(const uint8_t* p) { float x; std::memcpy(&x, p, 4); return V::set(x); }

// acc += steps k to END (4 columns each) of one group, for T tokens.
template <int FORMAT, int T, int CHAINS, int k, int END>
HERD_INLINE void steps(const uint8_t* g, int part, const uint8_t* const* x, int64_t at, I (&acc)[T][CHAINS]) {
    if constexpr (k < END) {
        const I w = Fmt<FORMAT>::template numbers<k>(g, part);
        for (int t = 0; t < T; ++t) acc[t][k % CHAINS] = V::dot(acc[t][k % CHAINS], w, four(x[t] + at + 4 * k));
        steps<FORMAT, T, CHAINS, k + 1, END>(g, part, x, at, acc);
    }
}

// run += one group, for T tokens; x + at is their record of it.
template <int FORMAT, int T>
HERD_INLINE void add_group(const uint8_t* head, const uint8_t* g, int part, const uint8_t* const* x, int64_t at, F (&run)[T]) {
    using Form = Fmt<FORMAT>;
    constexpr int CHAINS = T <= 2 ? 2 : 1;  // few tokens: two chains, so that one product does not wait for the other
    constexpr int STEPS = 8 / Form::SCALES;
    auto part_of = [&]<int HALF>() __attribute__((always_inline)) {
        I acc[T][CHAINS];
        for (int t = 0; t < T; ++t) {
            acc[t][0] = Form::ZERO ? V::ints(four(x[t] + at + (Form::SCALES == 2 ? REC_32 + 4 * HALF : Form::ZERO == 8 ? REC_8 : REC_128))) : V::ints(0);
            if constexpr (CHAINS == 2) acc[t][1] = V::ints(0);
        }
        steps<FORMAT, T, CHAINS, HALF * STEPS, (HALF + 1) * STEPS>(g, part, x, at, acc);
        const F s = Form::scale(head, g, part, HALF);
        for (int t = 0; t < T; ++t) run[t] = V::fma(V::floats(CHAINS == 2 ? V::plus(acc[t][0], acc[t][CHAINS - 1]) : acc[t][0]), s, run[t]);
    };
    part_of.template operator()<0>();
    if constexpr (Form::SCALES == 2) part_of.template operator()<1>();
    if constexpr (Form::MINIMUM) {
        const F m = Form::minimum(head, g, part);
        for (int t = 0; t < T; ++t) run[t] = V::fnma(m, float_at(x[t] + at + REC_SUM), run[t]);
    }
}

// run += groups i to END, for T tokens, written out: the processor then runs on from one group into the next.
template <int FORMAT, int T, int i, int END>
HERD_INLINE void add_groups(const uint8_t* head, const uint8_t* g, int part, const uint8_t* const* x, int64_t at, F (&run)[T]) {
    if constexpr (i < END) {
        constexpr int body = layout(FORMAT).body;
        // A few lines at a time: asked for all at once, they hold up the activations, which lie nearer. Into the second-level cache:
        // the first has places for some twenty lines under way, which all would be taken by those that memory is slow to bring.
        // With one token or two, memory is the limit and the processor's own prefetching does it; asked for nearby lines it is slower.
        if constexpr (T > 2)
            for (int j = 0; j < body; j += 64) __builtin_prefetch(g + i * body + AHEAD + j, 0, SECOND_LEVEL);
        add_group<FORMAT, T>(head, g + i * body, part, x, at + i * RECORD, run);
        asm volatile("" : : : "memory");  // or the compiler mixes the groups and runs out of registers
        add_groups<FORMAT, T, i + 1, END>(head, g, part, x, at, run);
    }
}

// One panel for T tokens from `first` on.
template <int FORMAT, int T>
void tile(const uint8_t* w, const Acts& a, int64_t first, float* y, int64_t stride) {
    constexpr Layout l = layout(FORMAT);
    const uint8_t* x[T];
    for (int t = 0; t < T; ++t) x[t] = a.data + (first + t) * a.stride;
    alignas(64) float total[T][PANEL] = {};
    const uint8_t *head = w, *g = w + l.head;
    for (int64_t column = 0; column < a.columns; column += ACT_GROUP) {
        const int n = a.columns - column < ACT_GROUP ? int(a.columns - column) / GROUP : ACT_GROUP / GROUP;
        const int64_t at = column / GROUP * RECORD;
        for (int p = 0; p < PARTS; ++p) {
            F run[T];
            for (int t = 0; t < T; ++t) run[t] = V::zero();
            if (V::LANES > 1 && n == ACT_GROUP / GROUP) add_groups<FORMAT, T, 0, ACT_GROUP / GROUP>(head, g, p, x, at, run);
            else for (int i = 0; i < n; ++i) add_groups<FORMAT, T, 0, 1>(head, g + i * l.body, p, x, at + i * RECORD, run);
            for (int t = 0; t < T; ++t) {
                float* to = total[t] + p * V::LANES;
                V::store(to, V::fma(run[t], float_at(x[t] + at + REC_SCALE), V::load(to)));
            }
        }
        // The totals belong in memory: with them, and the sums of a group and of a block, there are more values than registers,
        // and left to itself the compiler moves those of the innermost loop out.
        if constexpr (T > 8 || PARTS > 1) asm volatile("" : : "r"(total) : "memory");
        g += n * l.body;
        if (l.head && (column + ACT_GROUP) % l.columns == 0) {
            head = g;
            g += l.head;
        }
    }
    for (int t = 0; t < T; ++t) std::memcpy(y + (first + t) * stride, total[t], sizeof total[t]);
}

#ifdef HERD_TILES
template <int FORMAT, int k>
HERD_INLINE void unpack(const uint8_t* g, uint8_t* to) {
    if constexpr (k < 8) {
        V::store_words(to + 64 * k, Fmt<FORMAT>::template numbers<k>(g, 0));
        unpack<FORMAT, k + 1>(g, to);
    }
}

// One panel for 16 tokens from `first` on, ACT_GROUP columns (or the rest of them) at a time; the same additions as `tile`.
template <int FORMAT>
void broad_tile(const Tiles& tiles, const uint8_t* w, const Acts& a, int64_t first, float* y, int64_t stride) {
    using Form = Fmt<FORMAT>;
    constexpr Layout l = layout(FORMAT);
    constexpr int T = TILE_TOKENS, N = TILE_GROUPS, STEPS = 8 / Form::SCALES;
    static_assert(N == ACT_GROUP / GROUP && PARTS == 1);
    alignas(64) float total[T][PANEL] = {};
    alignas(64) uint8_t numbers[N][8 * 64];
    alignas(64) int32_t sums[N][T][PANEL];
    const uint8_t *head = w, *g = w + l.head, *x = a.data + first * a.stride;
    for (int64_t column = 0; column < a.columns; column += ACT_GROUP) {
        const int n = a.columns - column < ACT_GROUP ? int(a.columns - column) / GROUP : N;
        const uint8_t* at = x + column / GROUP * RECORD;
        const uint8_t *inputs[N], *weights[N];
        for (int i = 0; i < N; ++i) {
            const int some = i < n ? i : 0;  // what is computed for groups beyond the last is not looked at
            for (int j = 0; i < n && j < l.body; j += 64) __builtin_prefetch(g + i * l.body + AHEAD + j, 0, SECOND_LEVEL);
            unpack<FORMAT, 0>(g + some * l.body, numbers[i]);
            inputs[i] = at + some * RECORD;
            weights[i] = numbers[i];
        }
        F run[T];
        for (int t = 0; t < T; ++t) run[t] = V::zero();
        int32_t later[Form::SCALES == 2 ? N : 1][T][PANEL];
        tiles.product(inputs, a.stride, weights, sums);
        if constexpr (Form::SCALES == 2) {
            for (int i = 0; i < N; ++i) inputs[i] += 4 * STEPS, weights[i] += 64 * STEPS;
            tiles.product(inputs, a.stride, weights, later);
        }
        for (int i = 0; i < n; ++i) {
            const uint8_t *group = g + i * l.body, *records = at + i * RECORD;
            for (int half = 0; half < Form::SCALES; ++half) {
                const F s = Form::scale(head, group, 0, half);
                constexpr int OFFSET = Form::SCALES == 2 ? REC_32 : Form::ZERO == 8 ? REC_8 : REC_128;
                for (int t = 0; t < T; ++t) {
                    const int32_t* sum = half ? later[Form::SCALES == 2 ? i : 0][t] : sums[i][t];
                    const I offset = V::ints(Form::ZERO ? four(records + t * a.stride + OFFSET + 4 * half) : 0);
                    run[t] = V::fma(V::floats(V::plus(V::words(reinterpret_cast<const uint8_t*>(sum)), offset)), s, run[t]);
                }
            }
            if constexpr (Form::MINIMUM) {
                const F m = Form::minimum(head, group, 0);
                for (int t = 0; t < T; ++t) run[t] = V::fnma(m, float_at(records + t * a.stride + REC_SUM), run[t]);
            }
        }
        for (int t = 0; t < T; ++t) V::store(total[t], V::fma(run[t], float_at(at + t * a.stride + REC_SCALE), V::load(total[t])));
        g += n * l.body;
        if (l.head && (column + ACT_GROUP) % l.columns == 0) {
            head = g;
            g += l.head;
        }
    }
    for (int t = 0; t < T; ++t) std::memcpy(y + (first + t) * stride, total[t], sizeof total[t]);
}
#endif

// One panel for tokens [0, rows): y [rows, stride], the panel's 16 columns of it.
template <int FORMAT>
void panel(const uint8_t* w, const Acts& a, int64_t rows, float* y, int64_t stride) {
    constexpr int MOST = V::LANES == 8 ? 4 : 12;  // AVX2 has 16 registers, the others 32
    int64_t t = 0;
#ifdef HERD_TILES
    if (rows >= TILE_TOKENS) {
        const Tiles tiles(8 / Fmt<FORMAT>::SCALES);
        for (; rows - t >= TILE_TOKENS; t += TILE_TOKENS) broad_tile<FORMAT>(tiles, w, a, t, y, stride);
    }
#endif
    constexpr bool HALVES = MOST > 8 && Fmt<FORMAT>::SCALES == 2;  // 16 tokens are faster as 12 and 4, where a group has one scale
    for (; rows - t >= MOST && !(HALVES && rows - t == 16); t += MOST) tile<FORMAT, MOST>(w, a, t, y, stride);
    if constexpr (MOST > 8) for (; rows - t >= 8; t += 8) tile<FORMAT, 8>(w, a, t, y, stride);
    if (rows - t >= 4) { tile<FORMAT, 4>(w, a, t, y, stride); t += 4; }
    if (rows - t >= 2) { tile<FORMAT, 2>(w, a, t, y, stride); t += 2; }
    if (rows - t >= 1) tile<FORMAT, 1>(w, a, t, y, stride);
}

}  // namespace herd::HERD_ISA
