// Attention of ragged rows over paged keys and values: an online softmax over tiles of TILE keys that begin at multiples of TILE,
// every sum in one fixed order. So a row's result depends on its own keys alone, not on what is computed beside it.
#pragma once
#include "cache.h"

namespace herd::HERD_ISA {

// Query rows of one sequence at positions first, first + 1, ...; `group` query heads share key head `head`.
struct Asked {
    Pages keys, values;
    int64_t head, heads;     // the first key head and how many: together, since their rows lie side by side in the cache
    const float* q;          // [rows, stride]; the first group's heads begin here
    float* out;              // likewise
    int64_t stride, rows, group, first;
    int64_t chunk;           // rows see no key before their chunk; 0: they see all
    float scale;
};

// score[key] = q . key * scale for `n` keys, LANES at a time; keys beyond n are scored too, and their scores mean nothing.
inline void score_keys(const float* q, const float* keys, int64_t n, int64_t dim, float scale, float* score) {
    for (int64_t j = 0; j < n; j += L) {
        const float* k = keys + j * dim;
        F s[L];
        for (int i = 0; i < L; ++i) s[i] = V::zero();
        for (int64_t d = 0; d < dim; d += L) {
            const F x = V::load(q + d);
            for (int i = 0; i < L; ++i) s[i] = V::fma(x, V::load(k + i * dim + d), s[i]);
        }
        V::store(score + j, V::mul(V::sums(s), V::set(scale)));
    }
}

// Turns scores [TILE] into weights, 0 outside [low, high), and takes them into a row's running maximum and mass. Returns what the
// row's sum so far must be multiplied by.
inline float soften(float* s, int64_t low, int64_t high, float& top, float& mass) {
    for (int64_t j = 0; j < low; ++j) s[j] = -__builtin_inff();
    for (int64_t j = high; j < TILE; ++j) s[j] = -__builtin_inff();
    F m = V::set(-__builtin_inff());
    for (int64_t j = 0; j < TILE; j += L) m = V::max(m, V::load(s + j));
    const float most = V::top(m), now = most > top ? most : top;
    const float keep = top == -__builtin_inff() ? 0.0f : __builtin_expf(top - now);
    for (int64_t j = 0; j < TILE; j += L) V::store(s + j, exponential(V::sub(V::load(s + j), V::set(now))));
    for (int64_t j = 0; j < low; ++j) s[j] = 0;
    for (int64_t j = high; j < TILE; ++j) s[j] = 0;
    F sum = V::zero();
    for (int64_t j = 0; j < TILE; j += L) sum = V::add(sum, V::load(s + j));
    top = now;
    mass = mass * keep + V::sum(sum);
    return keep;
}

// out[q] = out[q] * keep[q] + sum of weight[q, j] * value[j] over keys [low, high), for N queries and W vectors of their head.
template <int N, int W>
inline void gather(const float* weight, const float* values, int64_t low, int64_t high, int64_t dim, float* const* out, const float* keep) {
    F a[N][W];
    for (int q = 0; q < N; ++q)
        for (int w = 0; w < W; ++w) a[q][w] = V::mul(V::load(out[q] + w * L), V::set(keep[q]));
    for (int64_t j = low; j < high; ++j) {
        F v[W];
        for (int w = 0; w < W; ++w) v[w] = V::load(values + j * dim + w * L);
        for (int q = 0; q < N; ++q) {
            const F p = V::set(weight[q * TILE + j]);
            for (int w = 0; w < W; ++w) a[q][w] = V::fma(p, v[w], a[q][w]);
        }
    }
    for (int q = 0; q < N; ++q)
        for (int w = 0; w < W; ++w) V::store(out[q] + w * L, a[q][w]);
}

// The same for any number of queries and any head that is whole vectors. Keys outside [low, high) are not touched: they may hold
// anything, and zero times NaN is NaN.
inline void gather_all(int64_t n, const float* weight, const float* values, int64_t low, int64_t high, int64_t dim, float* const* out, const float* keep) {
    constexpr int N = 4, W = L == 8 ? 2 : 4;  // N * W sums stay in registers
    for (int64_t q = 0; q < n;) {
        const bool many = n - q >= N;
        for (int64_t d = 0; d < dim;) {
            const bool broad = dim - d >= W * L;
            float* to[N];
            for (int i = 0; i < (many ? N : 1); ++i) to[i] = out[q + i] + d;
            const float* p = weight + q * TILE;
            if (many && broad) gather<N, W>(p, values + d, low, high, dim, to, keep + q);
            else if (many) gather<N, 1>(p, values + d, low, high, dim, to, keep + q);
            else if (broad) gather<1, W>(p, values + d, low, high, dim, to, keep + q);
            else gather<1, 1>(p, values + d, low, high, dim, to, keep + q);
            d += broad ? W * L : L;
        }
        q += many ? N : 1;
    }
}

// head_dim is whole vectors, heads * rows * group at most MAX_QUERIES; scratch holds (MAX_QUERIES + 2 head_dim) * TILE floats.
template <int KIND> void attend(const Asked& a, float* scratch) {
    const int64_t dim = a.keys.head_dim, n = a.rows * a.group;
    float* score = scratch;                                 // [n, TILE]
    float* keys = score + MAX_QUERIES * TILE;               // [TILE, dim]
    float* values = keys + TILE * dim;
    const float* q[MAX_QUERIES];
    float* out[MAX_QUERIES];
    float top[MAX_QUERIES], mass[MAX_QUERIES], keep[MAX_QUERIES];
    for (int64_t i = 0; i < a.heads * n; ++i) {
        const int64_t at = i % n / a.group * a.stride + (i / n * a.group + i % a.group) * dim;
        q[i] = a.q + at;
        out[i] = a.out + at;
        top[i] = -__builtin_inff();
        mass[i] = 0;
        for (int64_t d = 0; d < dim; d += L) V::store(out[i] + d, V::zero());
    }
    auto from = [&](int64_t row) { return a.chunk ? (a.first + row) / a.chunk * a.chunk : 0; };
    const int64_t lowest = from(0), last = a.first + a.rows;
    for (int64_t tile = lowest / TILE * TILE; tile < last; tile += TILE) {
        const int64_t begin = tile > lowest ? tile : lowest, end = tile + TILE < last ? tile + TILE : last;
        // Whole vectors of keys are scored: the first may begin before `begin`, where the buffer holds something, if not keys.
        const int64_t skip = (begin - tile) / L * L;
        const bool all_see_all = from(a.rows - 1) <= begin && end <= a.first + 1;
        for (int64_t head = 0; head < a.heads; ++head) {
            const int64_t base = head * n;
            // The next head's rows lie beside this one's; after the last head comes the next tile.
            const bool more = head + 1 < a.heads;
            const int64_t next = more ? a.head + head + 1 : a.head, from_next = more ? begin : tile + TILE, to_next = more ? end : end + TILE < last ? end + TILE : last;
            fetch<KIND>(a.keys, a.head + head, begin, end, Later<KIND>(a.keys, next, from_next, to_next), keys + (begin - tile) * dim);
            fetch<KIND>(a.values, a.head + head, begin, end, Later<KIND>(a.values, next, from_next, to_next), values + (begin - tile) * dim);
            for (int64_t r = 0; r < a.rows; ++r) {
                const int64_t i = r * a.group, seen = a.first + r + 1;
                const int64_t low = (begin > from(r) ? begin : from(r)) - tile, high = (end < seen ? end : seen) - tile;
                if (low >= high) continue;
                for (int64_t h = i; h < i + a.group; ++h) {
                    float* s = score + h * TILE;
                    score_keys(q[base + h], keys + skip * dim, high - skip, dim, a.scale, s + skip);
                    keep[h] = soften(s, low, high, top[base + h], mass[base + h]);
                }
                if (!all_see_all) gather_all(a.group, score + i * TILE, values, low, high, dim, out + base + i, keep + i);
            }
            if (all_see_all) gather_all(n, score, values, begin - tile, end - tile, dim, out + base, keep);
        }
    }
    for (int64_t i = 0; i < a.heads * n; ++i) {
        const F whole = V::set(1.0f / mass[i]);
        for (int64_t d = 0; d < dim; d += L) V::store(out[i] + d, V::mul(V::load(out[i] + d), whole));
    }
}

}  // namespace herd::HERD_ISA
