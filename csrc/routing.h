// Which rows go to which expert.
#pragma once
#include "product.h"

namespace herd::HERD_ISA {

// The k largest of a row's logits, the first of equal ones before; their scores are sigmoids. NaN is larger than every number, as in
// torch's topk, so that a spoilt row stays spoilt.
inline void choose(const float* logits, int64_t experts, int64_t k, int64_t* chosen, float* score) {
    for (int64_t j = 0; j < k; ++j) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; ++e) {
            bool taken = false;
            for (int64_t i = 0; i < j; ++i) taken |= chosen[i] == e;
            if (taken) continue;
            const bool larger = best < 0 || logits[e] > logits[best] || (logits[e] != logits[e] && logits[best] == logits[best]);
            if (larger) best = e;
        }
        chosen[j] = best;
        score[j] = 1.0f / (1.0f + __builtin_expf(-logits[best]));
    }
}

inline int64_t strips_of(const Matrix& m) { return (m.rows + ACT_GROUP - 1) / ACT_GROUP; }

// Places of rows x k in the order of their experts, and the work that follows: strips of w1 and w3, panels of w2, in pieces.
inline void sort_rows(const Buffers& b, int64_t rows, const Layer& l, const Inputs& in, const Inputs& gated) {
    const int64_t experts = l.n_experts, k = l.top_k;
    for (int64_t e = 0; e <= experts; ++e) b.begin[e] = 0;
    for (int64_t i = 0; i < rows * k; ++i) ++b.begin[b.chosen[i] + 1];
    for (int64_t e = 0; e < experts; ++e) {
        b.begin[e + 1] += b.begin[e];
        b.next[e] = b.begin[e];
    }
    for (int64_t i = 0; i < rows * k; ++i) b.place[i] = b.next[b.chosen[i]]++;
    int64_t up = 0, down = 0;
    for (int64_t e = 0; e < experts; ++e) {
        const int64_t n = b.begin[e + 1] - b.begin[e];
        for (int64_t p = 0; p < pieces(in, n) * strips_of(l.experts[0]); ++p) b.up[up++] = {e, p};
        for (int64_t p = 0; p < pieces(gated, n) * panels(l.experts[1]); ++p) b.down[down++] = {e, p};
    }
    *b.n_up = up;
    *b.n_down = down;
}

}  // namespace herd::HERD_ISA
