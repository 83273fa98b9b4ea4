// Which rows go to which expert.
#pragma once
#include "product.h"

namespace herd::HERD_ISA {

struct Routing {           // which rows go to which expert: places are rows x top_k, sorted by expert
    std::vector<int64_t> chosen, place, row, begin;  // [rows, top_k] expert and place; [places] row; [experts + 1]
    std::vector<float> score, logits;
    struct Job { int64_t expert, panel; };
    std::vector<Job> up, down;
    void fit(int64_t rows, int64_t experts, int64_t k) {
        chosen.resize(rows * k); place.resize(rows * k); row.resize(rows * k); score.resize(rows * k);
        logits.resize(rows * experts); begin.resize(experts + 1);
    }
    // The k largest of a row's logits, the first of equal ones before; their scores are sigmoids.
    void choose(int64_t r, int64_t experts, int64_t k) {
        const float* x = logits.data() + r * experts;
        for (int64_t j = 0; j < k; ++j) {
            int64_t best = -1;
            for (int64_t e = 0; e < experts; ++e) {
                bool taken = false;
                for (int64_t i = 0; i < j; ++i) taken |= chosen[r * k + i] == e;
                if (!taken && (best < 0 || x[e] > x[best])) best = e;
            }
            chosen[r * k + j] = best;
            score[r * k + j] = 1.0f / (1.0f + std::exp(-x[best]));
        }
    }
    void sort(int64_t rows, int64_t experts, int64_t k, const Matrix* weights) {
        std::fill(begin.begin(), begin.end(), 0);
        for (int64_t e : chosen) ++begin[e + 1];
        for (int64_t e = 0; e < experts; ++e) begin[e + 1] += begin[e];
        std::vector<int64_t> next(begin.begin(), begin.end() - 1);
        for (int64_t i = 0; i < rows * k; ++i) {
            place[i] = next[chosen[i]]++;
            row[place[i]] = i / k;
        }
        up.clear();
        down.clear();
        for (int64_t e = 0; e < experts; ++e) {
            if (begin[e] == begin[e + 1]) continue;
            for (int64_t p = 0; p < 2 * panels(weights[3 * e]); ++p) up.push_back({e, p});
            for (int64_t p = 0; p < panels(weights[3 * e + 1]); ++p) down.push_back({e, p});
        }
    }
};

}  // namespace herd::HERD_ISA
