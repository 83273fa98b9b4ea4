// The feed-forward of a layer: dense, or a shared expert beside routed ones. Called by every thread of a crew.
#pragma once
#include "routing.h"

namespace herd::HERD_ISA {

// Piece and strip `i` (ACT_GROUP columns) of silu(x @ w1^T) * (x @ w3^T), for rows that begin at row `at` of `to` and `floats`:
// put into the form that w2 reads as soon as it is complete, or left as floats [.., hidden].
inline void gate_strip(const Matrix& w1, const Matrix& w3, Form form, int64_t i, const Inputs& all, int64_t rows, int64_t at, const Acts& to, float* floats, float* spare, const Turn& turn) {
    const int64_t size = piece_rows(all, rows), strips = strips_of(w1), first = i / strips * size;
    const int64_t begin = i % strips * ACT_GROUP, n = w1.rows - begin < ACT_GROUP ? w1.rows - begin : ACT_GROUP;
    const int64_t count = rows - first < size ? rows - first : size;
    const Inputs in = all.from(first);
    float *a = spare, *b = spare + count * ACT_GROUP;
    // One matrix after the other: what is fetched ahead of a panel or a row is then what comes next.
    for (int64_t j = 0; j < n; j += PANEL) product(w1, (begin + j) / PANEL, in, count, a + j, ACT_GROUP, nullptr);
    for (int64_t j = 0; j < n; j += PANEL) product(w3, (begin + j) / PANEL, in, count, b + j, ACT_GROUP, nullptr);
    for (int64_t r = 0; r < count; ++r) gate(a + r * ACT_GROUP, b + r * ACT_GROUP, n);
    if (!turn.mine()) return;
    for (int64_t r = 0; r < count; ++r) {
        const float* x = a + r * ACT_GROUP;
        if (form != FLOATS) take_row(form, x, to, at + first + r, begin, n);
        else std::memcpy(floats + (at + first + r) * w1.rows + begin, x, n * sizeof(float));
    }
}

// b.out [rows, dim] = w2(gate(in))
inline void feed_dense(Crew& crew, const Layer& l, const Buffers& b, const Inputs& in, int64_t rows, float* spare) {
    const Inputs gated{b.gated, shaped(b.wide, l.w1.rows), form_of(l.w2)};
    crew.retake(pieces(in, rows) * strips_of(l.w1), [&](int64_t i, const Turn& turn) {
        gate_strip(l.w1, l.w3, gated.form, i, in, rows, 0, gated.acts, b.gated, spare, turn);
    });
    product_of(crew, l.w2, gated, rows, b.out, spare);
}

// b.out [rows, dim] += the routed experts' outputs: inputs are scaled by their scores, gathered by expert, and put back.
// Jobs differ from layer to layer, so none is retaken: who came back late would read those of another.
inline void feed_experts(Crew& crew, const Layer& l, const Buffers& b, int64_t rows, int64_t dim, float* spare) {
    const int64_t k = l.top_k, hidden = l.experts[0].rows;
    const Inputs scaled{b.scaled, shaped(b.narrow, dim), form_of(l.experts[0], l.experts[2])};
    const Inputs gated{b.gated, shaped(b.wide, hidden), form_of(l.experts[1])};
    crew.share(rows, [&](int64_t r) {
        float* logits = b.logits + r * l.n_experts;
        plain_rows(l.router, 0, l.n_experts, b.normed + r * dim, 1, logits, l.n_experts);
        choose(logits, l.n_experts, k, b.chosen + r * k, b.score + r * k);
    });
    crew.share(1, [&](int64_t) { sort_rows(b, rows, l, scaled, gated); });
    crew.share(rows * k, [&](int64_t i) {
        float* x = b.scaled + b.place[i] * dim;
        const float* from = b.normed + i / k * dim;
        for (int64_t j = 0; j < dim; ++j) x[j] = from[j] * b.score[i];
        take_row(scaled.form, x, scaled.acts, b.place[i], 0, dim);
    });
    crew.share(*b.n_up, [&](int64_t j) {
        const Job job = b.up[j];
        const int64_t at = b.begin[job.expert], n = b.begin[job.expert + 1] - at;
        const Matrix* w = l.experts + 3 * job.expert;
        gate_strip(w[0], w[2], gated.form, job.part, scaled.from(at), n, at, gated.acts, b.gated, spare, Turn());
    });
    crew.share(*b.n_down, [&](int64_t j) {
        const Job job = b.down[j];
        const int64_t at = b.begin[job.expert], n = b.begin[job.expert + 1] - at;
        product_block(l.experts[3 * job.expert + 1], job.part, 1, gated.from(at), n, b.routed + at * dim, spare, Turn());
    });
    crew.share(rows, [&](int64_t r) {
        for (int64_t j = 0; j < dim; ++j) {
            float sum = 0;
            for (int64_t i = 0; i < k; ++i) sum += b.routed[b.place[r * k + i] * dim + j];
            b.out[r * dim + j] += sum;
        }
    });
}

}  // namespace herd::HERD_ISA
