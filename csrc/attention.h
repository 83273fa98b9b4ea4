// Attention of ragged rows over paged keys and values, with an online softmax over tiles of TILE keys at absolute positions:
// a row's result depends on its own keys alone, not on what is computed beside it.
#pragma once
#include "rows.h"

namespace herd::HERD_ISA {

constexpr int TILE = 64;          // keys
constexpr int MAX_QUERIES = 64;   // query rows x heads of a group that are answered together

enum Kind : int { FLOAT = 0, HALF = 1, BRAIN = 30 };

inline int width(int kind) { return kind == FLOAT ? 4 : 2; }

template <int KIND> inline F element(const uint8_t* p, int64_t i) {
    if constexpr (KIND == FLOAT) return V::load(reinterpret_cast<const float*>(p) + i);
    if constexpr (KIND == HALF) return V::halves(p + 2 * i);
    return V::brains(reinterpret_cast<const uint16_t*>(p) + i);
}

struct Paged {
    const uint8_t* k;          // [blocks, block_size, n_kv_heads, head_dim]
    const uint8_t* v;
    int kind;
    int64_t block_size, n_kv_heads, head_dim;
    const int32_t* table;      // the sequence's blocks
    int64_t at(int64_t position, int64_t head) const {
        return ((int64_t(table[position / block_size]) * block_size + position % block_size) * n_kv_heads + head) * head_dim;
    }
};

// q, out: `rows` rows of one sequence at positions first, first + 1, ...; `group` query heads that share key head `head`.
// q [rows, stride], the group's heads begin at q; `from[r]` is the first position row r may see. head_dim % LANES == 0.
template <int KIND>
void attend(const Paged& c, int64_t head, const float* q, float* out, int64_t stride, int64_t rows, int64_t group,
            int64_t first, const int64_t* from, float scale, float* scratch) {
    const int64_t dim = c.head_dim, n = rows * group;
    float* score = scratch;                       // [n, TILE]
    float top[MAX_QUERIES], mass[MAX_QUERIES];
    for (int64_t i = 0; i < n; ++i) {
        top[i] = -INFINITY;
        mass[i] = 0;
        float* o = out + i / group * stride + i % group * dim;
        for (int64_t d = 0; d < dim; d += L) V::store(o + d, V::zero());
    }
    int64_t lowest = from[0];
    for (int64_t r = 1; r < rows; ++r) lowest = from[r] < lowest ? from[r] : lowest;
    const int64_t last = first + rows - 1;
    for (int64_t tile = lowest / TILE * TILE; tile <= last; tile += TILE) {
        const int64_t begin = tile > lowest ? tile : lowest;
        const int64_t end = tile + TILE <= last + 1 ? tile + TILE : last + 1;
        for (int64_t j = begin; j < end; ++j) {
            const int64_t at = c.at(j, head);
            for (int64_t i = 0; i < n; ++i) {
                const float* x = q + i / group * stride + i % group * dim;
                F s = V::zero();
                for (int64_t d = 0; d < dim; d += L) s = V::fma(V::load(x + d), element<KIND>(c.k, at + d), s);
                score[i * TILE + j - tile] = V::sum(s) * scale;
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            const int64_t r = i / group;
            const int64_t low = begin > from[r] ? begin : from[r];
            const int64_t high = end < first + r + 1 ? end : first + r + 1;
            float* s = score + i * TILE;
            const bool sees = low < high;
            for (int64_t j = tile; j < tile + TILE; ++j)
                if (j < low || j >= high) s[j - tile] = sees ? -INFINITY : 0;
            if (!sees) continue;
            F m = V::set(-INFINITY);
            for (int64_t j = 0; j < TILE; j += L) m = V::max(m, V::load(s + j));
            const float was = top[i], now = V::top(m) > was ? V::top(m) : was;
            const float keep = was == -INFINITY ? 0.0f : std::exp(was - now);
            F sum = V::zero();
            for (int64_t j = 0; j < TILE; j += L) {
                const F e = exponential(V::sub(V::load(s + j), V::set(now)));
                V::store(s + j, e);
            }
            for (int64_t j = tile; j < tile + TILE; ++j)
                if (j < low || j >= high) s[j - tile] = 0;
            for (int64_t j = 0; j < TILE; j += L) sum = V::add(sum, V::load(s + j));
            top[i] = now;
            mass[i] = mass[i] * keep + V::sum(sum);
            float* o = out + r * stride + i % group * dim;
            for (int64_t d = 0; d < dim; d += L) V::store(o + d, V::mul(V::load(o + d), V::set(keep)));
        }
        for (int64_t j = begin; j < end; ++j) {
            const int64_t at = c.at(j, head);
            for (int64_t i = 0; i < n; ++i) {
                const float p = score[i * TILE + j - tile];
                if (p == 0) continue;  // keys it may not see, whatever they hold
                float* o = out + i / group * stride + i % group * dim;
                for (int64_t d = 0; d < dim; d += L) V::store(o + d, V::fma(V::set(p), element<KIND>(c.v, at + d), V::load(o + d)));
            }
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        float* o = out + i / group * stride + i % group * dim;
        const F m = V::set(1.0f / mass[i]);
        for (int64_t d = 0; d < dim; d += L) V::store(o + d, V::mul(V::load(o + d), m));
    }
}

}  // namespace herd::HERD_ISA
