// The layers of a Llama for one ragged batch: one parallel region, whose threads go through phases that depend on each other.
#pragma once
#include "attention.h"
#include "feed.h"

namespace herd::HERD_ISA {

inline void head_norm(float* x, int64_t n, float eps) {
    const float r = 1.0f / root(mean_square(x, n) + eps);
    for (int64_t i = 0; i < n; i += L) V::store(x + i, V::mul(V::load(x + i), V::set(r)));
}

// Queries or keys of one row, x [heads, head_dim], get their position.
inline void place(const Model& m, const Layer& l, const Step& s, int64_t row, float* x, int64_t heads, bool query) {
    for (int64_t h = 0; h < heads; ++h) {
        float* head = x + h * m.head_dim;
        if (l.placement == ROPE || l.placement == ROPE_NORM)
            rotate(head, s.cos + row * m.head_dim / 2, s.sin + row * m.head_dim / 2, m.head_dim);
        if (l.placement == ROPE_NORM) head_norm(head, m.head_dim, float(m.norm_eps));
        if (l.placement == TEMPERED && query)
            for (int64_t i = 0; i < m.head_dim; i += L) V::store(head + i, V::mul(V::load(head + i), V::set(s.temper[row])));
    }
}

// Calls f with the kind of the cache as a constant.
template <typename Call> inline void by_kind(int64_t kind, const Call& f) {
    if (kind == F32) f.template operator()<F32>();
    else if (kind == F16) f.template operator()<F16>();
    else if (kind == BF16) f.template operator()<BF16>();
    else f.template operator()<I8>();
}

inline void self_attention(Crew& crew, const Model& m, const Layer& l, const Step& s, const Buffers& b, int64_t index, float* spare) {
    const int64_t T = s.rows, D = m.dim, Q = m.n_heads * m.head_dim, KV = m.n_kv_heads * m.head_dim, group = m.n_heads / m.n_kv_heads;
    float* scales[2] = {s.k_scale ? s.k_scale[index] : nullptr, s.v_scale ? s.v_scale[index] : nullptr};
    const Inputs in{b.normed, shaped(b.narrow, D), form_of(l.wq, l.wk, l.wv)};
    const int64_t n = pieces(in, T), block = block_of(n * (panels(l.wq) + panels(l.wk) + panels(l.wv)), crew.threads());
    const int64_t nq = n * blocks(l.wq, block), nk = n * blocks(l.wk, block), nv = n * blocks(l.wv, block);
    crew.retake(nq + nk + nv, [&](int64_t i, const Turn& turn) {
        if (i < nq) product_block(l.wq, i, block, in, T, b.q, spare, turn);
        else if (i < nq + nk) product_block(l.wk, i - nq, block, in, T, b.k, spare, turn);
        else product_block(l.wv, i - nq - nk, block, in, T, b.v, spare, turn);
    });
    crew.share(T, [&](int64_t r) {
        place(m, l, s, r, b.q + r * Q, m.n_heads, true);
        place(m, l, s, r, b.k + r * KV, m.n_kv_heads, false);
        by_kind(s.kv_kind, [&]<int KIND>() {
            keep<KIND>(s.k[index], scales[0], s.slot[r], b.k + r * KV, m.n_kv_heads, m.head_dim);
            keep<KIND>(s.v[index], scales[1], s.slot[r], b.v + r * KV, m.n_kv_heads, m.head_dim);
        });
    });
    // Single rows take several heads at once, so that a long cache is read in longer runs, as long as every thread has some.
    int64_t most = 1;
    for (int64_t i = 0; i < b.n_tasks; ++i) most = b.tasks[i].rows > most ? b.tasks[i].rows : most;
    int64_t together = MAX_QUERIES / (most * group);
    while (together > 1 && (together > m.n_kv_heads || b.n_tasks * m.n_kv_heads < 2 * together * crew.threads())) together /= 2;
    if (together < 1) together = 1;
    const int64_t parts = (m.n_kv_heads + together - 1) / together;
    crew.share(b.n_tasks * parts, [&](int64_t i) {
        const Task& t = b.tasks[i / parts];
        const int64_t head = i % parts * together, at = t.row * Q + head * group * m.head_dim;
        const int64_t heads = m.n_kv_heads - head < together ? m.n_kv_heads - head : together;
        const int32_t* table = s.tables + t.sequence * s.table_stride;
        const Asked asked{
            {s.k[index], scales[0], table, s.block_size, m.n_kv_heads, m.head_dim},
            {s.v[index], scales[1], table, s.block_size, m.n_kv_heads, m.head_dim},
            head, heads, b.q + at, b.normed + at, Q, t.rows, group, t.position, l.chunk, 1.0f / root(float(m.head_dim))};
        by_kind(s.kv_kind, [&]<int KIND>() { attend<KIND>(asked, spare); });
    });
    const Inputs seen{b.normed, shaped(b.narrow, Q), form_of(l.wo)};
    if (seen.form != FLOATS) crew.share(T, [&](int64_t r) { take_row(seen.form, b.normed + r * Q, seen.acts, r, 0, Q); });
    product_of(crew, l.wo, seen, T, b.out, spare);
}

// x += b.out where there is something to add; then the normalised rows, also in the form that their readers want.
inline void norm_rows(Crew& crew, const Model& m, const Step& s, const Buffers& b, bool add, const float* weight, Form form) {
    const Acts acts = shaped(b.narrow, m.dim);
    crew.share(s.rows, [&](int64_t r) {
        float *x = s.x + r * m.dim, *y = b.normed + r * m.dim;
        if (add)
            for (int64_t i = 0; i < m.dim; ++i) x[i] += b.out[r * m.dim + i];
        rms_norm(x, weight, m.dim, float(m.norm_eps), y);
        take_row(form, y, acts, r, 0, m.dim);
    });
}

inline void forward(const Model& m, const Step& s, const Buffers& b) {
    #pragma omp parallel num_threads(int(b.team.threads))
    {
        Crew crew(b.team, thread_number());
        float* spare = b.spare + thread_number() * b.spare_floats;
        for (int64_t index = s.first_layer; index < s.last_layer; ++index) {
            const Layer& l = m.layers[index];
            norm_rows(crew, m, s, b, index > s.first_layer, l.attention_norm, form_of(l.wq, l.wk, l.wv));
            self_attention(crew, m, l, s, b, index, spare);
            norm_rows(crew, m, s, b, true, l.ffn_norm, form_of(l.w1, l.w3));
            feed_dense(crew, l, b, {b.normed, shaped(b.narrow, m.dim), form_of(l.w1, l.w3)}, s.rows, spare);
            if (l.n_experts) feed_experts(crew, l, b, s.rows, m.dim, spare);
        }
        crew.share(s.rows, [&](int64_t r) {
            for (int64_t i = 0; i < m.dim; ++i) s.x[r * m.dim + i] += b.out[r * m.dim + i];
        });
    }
}

}  // namespace herd::HERD_ISA
