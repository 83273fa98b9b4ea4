// The layers of a dense Llama for one ragged batch: one parallel region, a barrier between what depends on each other.
#pragma once
#include <initializer_list>
#include "attention.h"
#include "routing.h"

namespace herd::HERD_ISA {

struct Buffers {           // carved from one allocation, reused from step to step
    std::vector<float> normed, q, k, v, out, a, b, scale, score;
    std::vector<int8_t> int8;
    std::vector<int32_t> sum;
    std::vector<float> scaled, routed;
    Routing routing;
    void fit(const Model& m, int64_t tokens, int64_t top_k, int threads) {
        const int64_t width = std::max({m.dim, m.n_heads * m.head_dim, m.hidden_dim}), rows = tokens * std::max<int64_t>(1, top_k);
        auto grow = [](auto& v, int64_t n) { if (int64_t(v.size()) < n) v.resize(n); };
        grow(normed, rows * std::max(m.dim, m.n_heads * m.head_dim));
        grow(q, rows * m.n_heads * m.head_dim);
        grow(k, rows * m.n_kv_heads * m.head_dim);
        grow(v, rows * m.n_kv_heads * m.head_dim);
        grow(out, rows * m.dim);
        grow(a, rows * m.hidden_dim);
        grow(b, rows * m.hidden_dim);
        grow(int8, rows * width);
        grow(scale, rows * ((width + ACT_GROUP - 1) / ACT_GROUP));
        grow(sum, rows * (width / SUM_GROUP + 1));
        if (top_k) grow(scaled, rows * m.dim);
        if (top_k) grow(routed, rows * m.dim);
        grow(score, int64_t(threads) * MAX_QUERIES * TILE);
    }
};

struct Task { int64_t row, rows, position, sequence, head; };

template <int KIND> inline void store_cache(uint8_t* p, int64_t at, const float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += L) {
        const F f = V::load(x + i);
        if constexpr (KIND == FLOAT) V::store(reinterpret_cast<float*>(p) + at + i, f);
        if constexpr (KIND == HALF) V::store_halves(reinterpret_cast<uint16_t*>(p) + at + i, f);
        if constexpr (KIND == BRAIN) V::store_brains(reinterpret_cast<uint16_t*>(p) + at + i, f);
    }
}

inline void head_norm(float* x, int64_t n, float eps) {
    const float r = 1.0f / std::sqrt(mean_square(x, n) + eps);
    for (int64_t i = 0; i < n; i += L) V::store(x + i, V::mul(V::load(x + i), V::set(r)));
}

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

inline void forward(const Model& m, const Step& s, int threads) {
    static thread_local Buffers buffers;  // one per calling thread
    Buffers& b = buffers;
    int64_t top_k = 0;
    for (int64_t i = s.first_layer; i < s.last_layer; ++i) top_k = std::max(top_k, m.layers[i].top_k);
    b.fit(m, s.rows, top_k, threads);
    const int64_t T = s.rows, D = m.dim, Q = m.n_heads * m.head_dim, KV = m.n_kv_heads * m.head_dim;
    const int64_t group = m.n_heads / m.n_kv_heads, together = std::max<int64_t>(1, std::min<int64_t>(8, MAX_QUERIES / group));
    std::vector<Task> tasks;
    for (int64_t i = 0; i < s.n_spans; ++i)
        for (int64_t r = 0; r < s.spans[i].rows; r += together)
            for (int64_t h = 0; h < m.n_kv_heads; ++h)
                tasks.push_back({s.spans[i].row + r, std::min(together, s.spans[i].rows - r), s.spans[i].position + r, s.spans[i].sequence, h});
    const int64_t n_tasks = int64_t(tasks.size());
    const float scale = 1.0f / std::sqrt(float(m.head_dim));
    auto acts = [&](int64_t columns) { return Acts{b.int8.data(), b.scale.data(), b.sum.data(), columns}; };
    // Part [begin, begin + n) of a row is quantized when one of its readers is. begin and n are whole activation groups.
    auto ready = [&](const float* x, int64_t row, int64_t columns, int64_t begin, int64_t n, std::initializer_list<const Matrix*> readers) {
        const Acts a = acts(columns);
        if (std::none_of(readers.begin(), readers.end(), [](const Matrix* m) { return quantized(*m); })) return;
        quantize(x + row * columns + begin, n, b.int8.data() + row * columns + begin, b.scale.data() + row * a.scales() + begin / ACT_GROUP, b.sum.data() + row * a.sums() + begin / SUM_GROUP);
    };
    auto inputs = [&](const float* x, int64_t columns) { return Inputs{x, acts(columns)}; };
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> spare;
        float* score = b.score.data() + thread_number() * MAX_QUERIES * TILE;
        for (int64_t index = s.first_layer; index < s.last_layer; ++index) {
            const Layer& l = m.layers[index];
            const bool add = index > s.first_layer;
            #pragma omp for schedule(static)
            for (int64_t r = 0; r < T; ++r) {
                float* x = s.x + r * D;
                if (add) for (int64_t i = 0; i < D; ++i) x[i] += b.out[r * D + i];
                rms_norm(x, l.attention_norm, D, float(m.norm_eps), b.normed.data() + r * D);
                ready(b.normed.data(), r, D, 0, D, {&l.wq, &l.wk, &l.wv});
            }
            const Inputs in = inputs(b.normed.data(), D);
            const int64_t pq = panels(l.wq), pk = panels(l.wk), pv = panels(l.wv);
            #pragma omp for schedule(static)
            for (int64_t p = 0; p < pq + pk + pv; ++p) {
                if (p < pq) product(l.wq, p, in, T, b.q.data(), spare);
                else if (p < pq + pk) product(l.wk, p - pq, in, T, b.k.data(), spare);
                else product(l.wv, p - pq - pk, in, T, b.v.data(), spare);
            }
            #pragma omp for schedule(static)
            for (int64_t r = 0; r < T; ++r) {
                place(m, l, s, r, b.q.data() + r * Q, m.n_heads, true);
                place(m, l, s, r, b.k.data() + r * KV, m.n_kv_heads, false);
                const int64_t at = s.slot[r] * KV;
                auto keep = [&](auto kind) {
                    store_cache<decltype(kind)::value>(s.k[index], at, b.k.data() + r * KV, KV);
                    store_cache<decltype(kind)::value>(s.v[index], at, b.v.data() + r * KV, KV);
                };
                if (s.kv_kind == FLOAT) keep(std::integral_constant<int, FLOAT>{});
                else if (s.kv_kind == HALF) keep(std::integral_constant<int, HALF>{});
                else keep(std::integral_constant<int, BRAIN>{});
            }
            #pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < n_tasks; ++i) {
                const Task& t = tasks[i];
                const Paged c{s.k[index], s.v[index], int(s.kv_kind), s.block_size, m.n_kv_heads, m.head_dim, s.tables + t.sequence * s.table_stride};
                int64_t from[MAX_QUERIES];
                for (int64_t r = 0; r < t.rows; ++r) from[r] = l.chunk ? (t.position + r) / l.chunk * l.chunk : 0;
                const int64_t at = t.row * Q + t.head * group * m.head_dim;
                auto run = [&](auto kind) {
                    attend<decltype(kind)::value>(c, t.head, b.q.data() + at, b.normed.data() + at, Q, t.rows, group, t.position, from, scale, score);
                };
                if (s.kv_kind == FLOAT) run(std::integral_constant<int, FLOAT>{});
                else if (s.kv_kind == HALF) run(std::integral_constant<int, HALF>{});
                else run(std::integral_constant<int, BRAIN>{});
            }
            #pragma omp for schedule(static)
            for (int64_t r = 0; r < T; ++r) ready(b.normed.data(), r, Q, 0, Q, {&l.wo});
            const Inputs seen = inputs(b.normed.data(), Q);
            #pragma omp for schedule(static)
            for (int64_t p = 0; p < panels(l.wo); ++p) product(l.wo, p, seen, T, b.out.data(), spare);
            #pragma omp for schedule(static)
            for (int64_t r = 0; r < T; ++r) {
                float* x = s.x + r * D;
                for (int64_t i = 0; i < D; ++i) x[i] += b.out[r * D + i];
                rms_norm(x, l.ffn_norm, D, float(m.norm_eps), b.normed.data() + r * D);
                ready(b.normed.data(), r, D, 0, D, {&l.w1, &l.w3});
            }
            const int64_t H = l.w1.rows, ph = panels(l.w1);
            #pragma omp for schedule(static)
            for (int64_t p = 0; p < 2 * ph; ++p) {
                if (p & 1) product(l.w3, p / 2, in, T, b.b.data(), spare);
                else product(l.w1, p / 2, in, T, b.a.data(), spare);
            }
            const int64_t parts = (H + 4 * ACT_GROUP - 1) / (4 * ACT_GROUP);
            #pragma omp for schedule(static)
            for (int64_t i = 0; i < T * parts; ++i) {
                const int64_t r = i / parts, begin = i % parts * 4 * ACT_GROUP, n = std::min<int64_t>(4 * ACT_GROUP, H - begin);
                float* x = b.a.data() + r * H + begin;
                gate(x, b.b.data() + r * H + begin, n);
                ready(b.a.data(), r, H, begin, n, {&l.w2});
            }
            const Inputs gated = inputs(b.a.data(), H);
            #pragma omp for schedule(static)
            for (int64_t p = 0; p < panels(l.w2); ++p) product(l.w2, p, gated, T, b.out.data(), spare);
            if (!l.n_experts) continue;
            // The routed experts: their inputs are scaled, gathered by expert, and their outputs added to the shared one's.
            const int64_t E = l.n_experts, k = l.top_k, X = l.experts[0].rows;
            Routing& route = b.routing;
            #pragma omp single
            route.fit(T, E, k);
            #pragma omp for schedule(static)
            for (int64_t r = 0; r < T; ++r) {
                plain_rows(l.router, 0, E, b.normed.data() + r * D, 1, route.logits.data() + r * E);
                route.choose(r, E, k);
            }
            #pragma omp single
            route.sort(T, E, k, l.experts);
            #pragma omp for schedule(static)
            for (int64_t i = 0; i < T * k; ++i) {
                float* x = b.scaled.data() + route.place[i] * D;
                const float* from = b.normed.data() + i / k * D;
                for (int64_t j = 0; j < D; ++j) x[j] = from[j] * route.score[i];
                ready(b.scaled.data(), route.place[i], D, 0, D, {&l.experts[0], &l.experts[2]});
            }
            const Inputs scaled = inputs(b.scaled.data(), D);
            #pragma omp for schedule(dynamic, 4)
            for (size_t j = 0; j < route.up.size(); ++j) {
                const auto [e, p] = route.up[j];
                const int64_t at = route.begin[e], n = route.begin[e + 1] - at;
                float* y = (p & 1 ? b.b.data() : b.a.data()) + at * X;
                product(l.experts[3 * e + (p & 1 ? 2 : 0)], p / 2, scaled.from(at), n, y, spare);
            }
            const int64_t slices = (X + 4 * ACT_GROUP - 1) / (4 * ACT_GROUP);
            #pragma omp for schedule(static)
            for (int64_t i = 0; i < T * k * slices; ++i) {
                const int64_t r = i / slices, begin = i % slices * 4 * ACT_GROUP, n = std::min<int64_t>(4 * ACT_GROUP, X - begin);
                gate(b.a.data() + r * X + begin, b.b.data() + r * X + begin, n);
                ready(b.a.data(), r, X, begin, n, {&l.experts[1]});
            }
            const Inputs opened = inputs(b.a.data(), X);
            #pragma omp for schedule(dynamic, 4)
            for (size_t j = 0; j < route.down.size(); ++j) {
                const auto [e, p] = route.down[j];
                const int64_t at = route.begin[e], n = route.begin[e + 1] - at;
                product(l.experts[3 * e + 1], p, opened.from(at), n, b.routed.data() + at * D, spare);
            }
            #pragma omp for schedule(static)
            for (int64_t r = 0; r < T; ++r)
                for (int64_t j = 0; j < D; ++j) {
                    float sum = 0;
                    for (int64_t i = 0; i < k; ++i) sum += b.routed[route.place[r * k + i] * D + j];
                    b.out[r * D + j] += sum;
                }
        }
        #pragma omp for schedule(static)
        for (int64_t r = 0; r < T; ++r)
            for (int64_t i = 0; i < D; ++i) s.x[r * D + i] += b.out[r * D + i];
    }
}

}  // namespace herd::HERD_ISA
