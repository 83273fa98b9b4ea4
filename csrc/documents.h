// Causal attention inside of documents that lie back to back, and its gradients: for training.
//
// Queries meet keys in blocks of TILE positions, and nothing is computed between documents, nor above the diagonal but for the rest of a
// vector. All products are the one of `block_product`: numbers of the left side are broadcast, rows of the right side are vectors, so keys
// are turned (`turn`) where they are multiplied as columns. Arithmetic is float32 whatever is read and written. A block of queries
// (forward) and a document's key head (backward) is done by one thread in one order: results are the same bits for any number of them.
#pragma once
#include "attention.h"
#include "crew.h"

namespace herd::HERD_ISA {

// What of a square block is wanted: all of it, or that at and below its diagonal, as result, as left side, as left side turned.
enum Corner { WHOLE, BELOW, UP_TO, FROM };

constexpr int HIGH = 4, WIDE = L == 8 ? 2 : 4;  // rows and vectors of a patch: its sums stay in registers

struct Side { const float* at; int64_t row, column; };   // element (i, j) is at[i * row + j * column]

// c[m, n] (+)= sum over k in [from, to) of a[m, k] * b[k, n] for R rows and W vectors.
template <bool ADD, int R, int W> inline void patch(Side a, const float* b, int64_t b_row, int64_t from, int64_t to, float* c, int64_t c_row) {
    F s[R][W];
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) s[r][w] = ADD ? V::load(c + r * c_row + w * L) : V::zero();
    const float* x = a.at + from * a.column;
    b += from * b_row;
    for (int64_t k = from; k < to; ++k, x += a.column, b += b_row) {
        F y[W];
        for (int w = 0; w < W; ++w) y[w] = V::load(b + w * L);
        for (int r = 0; r < R; ++r) {
            const F f = V::set(x[r * a.row]);
            for (int w = 0; w < W; ++w) s[r][w] = V::fma(f, y[w], s[r][w]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) V::store(c + r * c_row + w * L, s[r][w]);
}

template <bool ADD, int R> inline void patches(int64_t count, Side a, const float* b, int64_t b_row, int64_t from, int64_t to, float* c, int64_t c_row) {
    if (count == 1) return patch<ADD, R, 1>(a, b, b_row, from, to, c, c_row);
    if (WIDE == 2 || count == 2) return patch<ADD, R, 2>(a, b, b_row, from, to, c, c_row);
    if (count == 3) return patch<ADD, R, WIDE == 2 ? 2 : 3>(a, b, b_row, from, to, c, c_row);
    patch<ADD, R, WIDE>(a, b, b_row, from, to, c, c_row);
}

// c [rows, columns] (+)= a [rows, depth] b [depth, columns]; columns are whole vectors.
template <bool ADD, Corner CORNER>
inline void block_product(int64_t rows, int64_t columns, int64_t depth, Side a, const float* b, int64_t b_row, float* c, int64_t c_row) {
    for (int64_t n = 0; n < columns; n += WIDE * L) {
        for (int64_t m = 0; m < rows;) {
            const bool many = rows - m >= HIGH;
            const int64_t below = m + (many ? HIGH : 1);
            const int64_t end = CORNER == BELOW && below < columns ? (below + L - 1) / L * L : columns;
            const int64_t from = CORNER == FROM ? m : 0, to = CORNER == UP_TO && below < depth ? below : depth;
            const Side part{a.at + m * a.row, a.row, a.column};
            const int64_t count = end - n < WIDE * L ? (end - n) / L : WIDE;
            if (count > 0 && many) patches<ADD, HIGH>(count, part, b + n, b_row, from, to, c + m * c_row + n, c_row);
            else if (count > 0) patches<ADD, 1>(count, part, b + n, b_row, from, to, c + m * c_row + n, c_row);
            m = below;
        }
    }
}

// `rows` rows of one head, x [.., stride], times `factor` -> [rows, dim].
template <int KIND> inline void take(const uint8_t* x, int64_t at, int64_t stride, int64_t rows, int64_t dim, float factor, float* to) {
    for (int64_t r = 0; r < rows; ++r, at += stride, to += dim)
        for (int64_t d = 0; d < dim; d += L) V::store(to + d, V::mul(element<KIND>(x + at * (KIND == F32 ? 4 : 2), d), V::set(factor)));
}

// The same turned: [dim, width], zeros beyond `rows`.
template <int KIND> inline void turn(const uint8_t* x, int64_t at, int64_t stride, int64_t rows, int64_t width, int64_t dim, float* to) {
    for (int64_t r = 0; r < width; ++r, at += stride) {
        for (int64_t d = 0; d < dim; d += L) {
            float some[L];
            V::store(some, r < rows ? element<KIND>(x + at * (KIND == F32 ? 4 : 2), d) : V::zero());
            for (int i = 0; i < L; ++i) to[(d + i) * width + r] = some[i];
        }
    }
}

template <int KIND> inline void put(const float* x, int64_t rows, int64_t dim, uint8_t* to, int64_t at, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r, at += stride, x += dim)
        for (int64_t d = 0; d < dim; d += L) {
            if constexpr (KIND == F32) V::store(reinterpret_cast<float*>(to) + at + d, V::load(x + d));
            else V::store_brains(reinterpret_cast<uint16_t*>(to) + at + d, V::load(x + d));
        }
}

inline int64_t vectors(int64_t n) { return (n + L - 1) / L * L; }

// One block of queries of all heads that share key head `head`, beside the blocks of keys before and at it.
template <int KIND> void look_back(const Documents& d, const DocumentBuffers& b, int64_t index, int64_t head, float* scratch) {
    const int64_t dim = d.head_dim, group = d.heads / d.kv_heads, stride = d.heads * dim;
    const Passage& own = b.passages[index];
    float *q = scratch, *out = q + TILE * dim, *weight = out + TILE * dim;
    const float scale = 1.0f / root(float(dim));
    for (int64_t h = head * group; h < (head + 1) * group; ++h) {
        float top[TILE], mass[TILE];
        for (int64_t r = 0; r < own.rows; ++r) top[r] = -__builtin_inff(), mass[r] = 0;
        take<KIND>(d.q, own.row * stride + h * dim, stride, own.rows, dim, scale, q);
        for (int64_t at = own.first; at <= index; ++at) {
            const Passage& seen = b.passages[at];
            const int64_t width = whole_lines(seen.rows), place = (seen.place * d.kv_heads + head * width) * dim;
            const float *keys = b.keys + place, *values = b.values + place;
            if (at < index) block_product<false, WHOLE>(own.rows, width, dim, {q, dim, 1}, keys, width, weight, TILE);
            else block_product<false, BELOW>(own.rows, width, dim, {q, dim, 1}, keys, width, weight, TILE);
            for (int64_t r = 0; r < own.rows; ++r) {
                const float kept = soften(weight + r * TILE, 0, at < index ? seen.rows : r + 1, top[r], mass[r]);
                if (at > own.first && kept != 1.0f)
                    for (int64_t i = 0; i < dim; i += L) V::store(out + r * dim + i, V::mul(V::load(out + r * dim + i), V::set(kept)));
            }
            const Side w{weight, TILE, 1};
            if (at < index && at > own.first) block_product<true, WHOLE>(own.rows, dim, seen.rows, w, values, dim, out, dim);
            else if (at < index) block_product<false, WHOLE>(own.rows, dim, seen.rows, w, values, dim, out, dim);
            else if (at > own.first) block_product<true, UP_TO>(own.rows, dim, seen.rows, w, values, dim, out, dim);
            else block_product<false, UP_TO>(own.rows, dim, seen.rows, w, values, dim, out, dim);
        }
        for (int64_t r = 0; r < own.rows; ++r) {
            const F part = V::set(1.0f / mass[r]);
            for (int64_t i = 0; i < dim; i += L) V::store(out + r * dim + i, V::mul(V::load(out + r * dim + i), part));
            d.sums[(own.row + r) * d.heads + h] = top[r] + __builtin_logf(mass[r]);
        }
        put<KIND>(out, own.rows, dim, d.out, own.row * stride + h * dim, stride);
    }
}

template <int KIND> void attend_documents(const Documents& d, const DocumentBuffers& b) {
    const int64_t dim = d.head_dim, H = d.kv_heads, stride = H * dim;
    #pragma omp parallel num_threads(int(b.team.threads))
    {
        Crew crew(b.team, thread_number());
        float* spare = b.spare + thread_number() * b.spare_floats;
        crew.share(b.n_passages * H, [&](int64_t i) {
            const Passage& p = b.passages[i / H];
            const int64_t at = p.row * stride + i % H * dim, width = whole_lines(p.rows), place = (p.place * H + i % H * width) * dim;
            turn<KIND>(d.k, at, stride, p.rows, width, dim, b.keys + place);
            take<KIND>(d.v, at, stride, p.rows, dim, 1.0f, b.values + place);
        });
        crew.share(b.n_passages * H, [&](int64_t i) { look_back<KIND>(d, b, i / H, i % H, spare); });
    }
}

// Gradients of one document's key head and of the query heads that share it.
template <int KIND> void learn_head(const Documents& d, const DocumentBuffers& b, int64_t first, int64_t last, int64_t head, float* scratch) {
    const int64_t dim = d.head_dim, group = d.heads / d.kv_heads, q_stride = d.heads * dim, k_stride = d.kv_heads * dim;
    const float scale = 1.0f / root(float(dim));
    float *turned_k = scratch, *turned_v = turned_k + dim * TILE, *keys = turned_v + dim * TILE;
    float *q = keys + TILE * dim, *grad = q + TILE * dim, *by_k = grad + TILE * dim, *by_v = by_k + TILE * dim;
    float *weight = by_v + TILE * dim, *change = weight + TILE * TILE;
    // delta = gradient . result: what every weight's gradient is lowered by, since the weights of a row sum to one.
    for (int64_t r = b.passages[first].row; r < b.passages[last - 1].row + b.passages[last - 1].rows; ++r) {
        for (int64_t h = head * group; h < (head + 1) * group; ++h) {
            const int64_t at = (r * q_stride + h * dim) * (KIND == F32 ? 4 : 2);
            F s = V::zero();
            for (int64_t i = 0; i < dim; i += L) s = V::fma(element<KIND>(d.grad + at, i), element<KIND>(d.out + at, i), s);
            b.delta[r * d.heads + h] = V::sum(s);
        }
    }
    for (int64_t j = first; j < last; ++j) {
        const Passage& seen = b.passages[j];
        const int64_t width = whole_lines(seen.rows), k_at = seen.row * k_stride + head * dim;
        turn<KIND>(d.k, k_at, k_stride, seen.rows, width, dim, turned_k);
        turn<KIND>(d.v, k_at, k_stride, seen.rows, width, dim, turned_v);
        take<KIND>(d.k, k_at, k_stride, seen.rows, dim, scale, keys);
        std::memset(by_k, 0, TILE * dim * sizeof(float));
        std::memset(by_v, 0, TILE * dim * sizeof(float));
        for (int64_t h = head * group; h < (head + 1) * group; ++h) {
            for (int64_t i = j; i < last; ++i) {
                const Passage& own = b.passages[i];
                const int64_t n = own.rows, q_at = own.row * q_stride + h * dim;
                const bool square = i == j;
                take<KIND>(d.q, q_at, q_stride, n, dim, scale, q);
                take<KIND>(d.grad, q_at, q_stride, n, dim, 1.0f, grad);
                if (square) {
                    block_product<false, BELOW>(n, width, dim, {q, dim, 1}, turned_k, width, weight, TILE);
                    block_product<false, BELOW>(n, width, dim, {grad, dim, 1}, turned_v, width, change, TILE);
                } else {
                    block_product<false, WHOLE>(n, width, dim, {q, dim, 1}, turned_k, width, weight, TILE);
                    block_product<false, WHOLE>(n, width, dim, {grad, dim, 1}, turned_v, width, change, TILE);
                }
                for (int64_t r = 0; r < n; ++r) {
                    // Of a square, what lies above the diagonal was computed to the end of a vector and weighs nothing.
                    const int64_t high = square ? r + 1 : seen.rows, end = vectors(high);
                    float *w = weight + r * TILE, *c = change + r * TILE;
                    const F sum = V::set(d.sums[(own.row + r) * d.heads + h]), delta = V::set(b.delta[(own.row + r) * d.heads + h]);
                    for (int64_t x = 0; x < end; x += L) V::store(w + x, exponential(V::sub(V::load(w + x), sum)));
                    for (int64_t x = high; x < end; ++x) w[x] = 0;
                    for (int64_t x = 0; x < end; x += L) V::store(c + x, V::mul(V::load(w + x), V::sub(V::load(c + x), delta)));
                    if (square)  // what the last rows of a patch have, and this one has not
                        for (int64_t x = end; x < vectors(high + HIGH) && x < width; ++x) w[x] = c[x] = 0;
                }
                float* by_q = d.by_q + q_at;
                if (square) {
                    block_product<true, FROM>(seen.rows, dim, n, {weight, 1, TILE}, grad, dim, by_v, dim);
                    block_product<true, FROM>(seen.rows, dim, n, {change, 1, TILE}, q, dim, by_k, dim);
                    if (j > first) block_product<true, UP_TO>(n, dim, seen.rows, {change, TILE, 1}, keys, dim, by_q, q_stride);
                    else block_product<false, UP_TO>(n, dim, seen.rows, {change, TILE, 1}, keys, dim, by_q, q_stride);
                } else {
                    block_product<true, WHOLE>(seen.rows, dim, n, {weight, 1, TILE}, grad, dim, by_v, dim);
                    block_product<true, WHOLE>(seen.rows, dim, n, {change, 1, TILE}, q, dim, by_k, dim);
                    if (j > first) block_product<true, WHOLE>(n, dim, seen.rows, {change, TILE, 1}, keys, dim, by_q, q_stride);
                    else block_product<false, WHOLE>(n, dim, seen.rows, {change, TILE, 1}, keys, dim, by_q, q_stride);
                }
            }
        }
        put<KIND>(by_k, seen.rows, dim, d.by_k, k_at, k_stride);
        put<KIND>(by_v, seen.rows, dim, d.by_v, k_at, k_stride);
    }
}

template <int KIND> void learn_documents(const Documents& d, const DocumentBuffers& b) {
    #pragma omp parallel num_threads(int(b.team.threads))
    {
        Crew crew(b.team, thread_number());
        float* spare = b.spare + thread_number() * b.spare_floats;
        crew.share(d.n_documents * d.kv_heads, [&](int64_t i) {
            const int64_t document = i / d.kv_heads;
            learn_head<KIND>(d, b, b.firsts[document], b.firsts[document + 1], i % d.kv_heads, spare);
        });
    }
}

inline void documents(const Documents& d, const DocumentBuffers& b) {
    if (d.kind == F32) attend_documents<F32>(d, b);
    else attend_documents<BF16>(d, b);
}

inline void documents_backward(const Documents& d, const DocumentBuffers& b) {
    if (d.kind == F32) learn_documents<F32>(d, b);
    else learn_documents<BF16>(d, b);
}

}  // namespace herd::HERD_ISA
