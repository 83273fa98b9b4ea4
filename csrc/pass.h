// The small steps of a layer that is trained, forward and backward, each in one pass over its numbers: norm, gate, rotation, and the
// loss of rows of logits. Numbers are float32 or bfloat16 (KIND) where they are stored and float32 in between; where the model rounds,
// these round, too. Rows are independent; what is summed over rows is summed in parts of PASS_ROWS, whoever computes them.
#pragma once
#include "crew.h"
#include "plain.h"

namespace herd::HERD_ISA {

template <int KIND> inline F get(const uint8_t* p, int64_t i) { return element<KIND>(p + i * (KIND == F32 ? 4 : 2), 0); }
template <int KIND> inline void set(uint8_t* p, int64_t i, F x) {
    if constexpr (KIND == F32) V::store(reinterpret_cast<float*>(p) + i, x);
    else V::store_brains(reinterpret_cast<uint16_t*>(p) + i, x);
}
template <int KIND> inline F rounded(F x) {
    if constexpr (KIND == F32) return x;
    uint16_t held[L];
    V::store_brains(held, x);
    return V::brains(held);
}

inline F logistic(F x) { return V::div(V::set(1.0f), V::add(V::set(1.0f), exponential(V::sub(V::zero(), x)))); }

// y = round(x * scale) * weight with scale = 1 / rms(x), which is kept.
template <int KIND> void norm_row(const Pass& s, int64_t row) {
    const int64_t n = s.columns, at = row * n;
    F sum[2] = {V::zero(), V::zero()};
    for (int64_t i = 0; i < n; i += L) {
        const F x = get<KIND>(s.a, at + i);
        sum[i / L % 2] = V::fma(x, x, sum[i / L % 2]);
    }
    const float scale = 1.0f / root(V::sum(V::add(sum[0], sum[1])) / float(n) + float(s.eps));
    s.scales[row] = scale;
    for (int64_t i = 0; i < n; i += L)
        set<KIND>(s.out, at + i, V::mul(rounded<KIND>(V::mul(get<KIND>(s.a, at + i), V::set(scale))), get<KIND>(s.weight, i)));
}

// With u = x * scale and d = grad * weight: scale * (d - u * mean(d * u)); adds grad * u to `by_weight` where there is one.
template <int KIND> void norm_row_back(const Pass& s, int64_t row, float* by_weight) {
    const int64_t n = s.columns, at = row * n;
    const F scale = V::set(s.scales[row]);
    F sum[2] = {V::zero(), V::zero()};
    for (int64_t i = 0; i < n; i += L) {
        const F u = V::mul(get<KIND>(s.a, at + i), scale), g = get<KIND>(s.grad, at + i);
        sum[i / L % 2] = V::fma(V::mul(g, get<KIND>(s.weight, i)), u, sum[i / L % 2]);
        if (by_weight) V::store(by_weight + i, V::fma(g, rounded<KIND>(u), V::load(by_weight + i)));
    }
    const F mean = V::set(V::sum(V::add(sum[0], sum[1])) / float(n));
    for (int64_t i = 0; i < n; i += L) {
        const F u = V::mul(get<KIND>(s.a, at + i), scale), d = V::mul(get<KIND>(s.grad, at + i), get<KIND>(s.weight, i));
        set<KIND>(s.by_a, at + i, V::mul(scale, V::fnma(u, mean, d)));
    }
}

template <int KIND> void gate_row(const Pass& s, int64_t row) {
    for (int64_t i = row * s.columns; i < (row + 1) * s.columns; i += L) {
        const F a = get<KIND>(s.a, i);
        set<KIND>(s.out, i, V::mul(rounded<KIND>(V::mul(a, logistic(a))), get<KIND>(s.b, i)));
    }
}

// silu'(a) = p + a p (1 - p) with p = 1 / (1 + e^-a)
template <int KIND> void gate_row_back(const Pass& s, int64_t row) {
    const F one = V::set(1.0f);
    for (int64_t i = row * s.columns; i < (row + 1) * s.columns; i += L) {
        const F a = get<KIND>(s.a, i), b = get<KIND>(s.b, i), g = get<KIND>(s.grad, i), p = logistic(a), v = V::mul(a, p);
        set<KIND>(s.by_a, i, V::mul(V::mul(g, b), V::fma(v, V::sub(one, p), p)));
        set<KIND>(s.by_b, i, V::mul(g, v));
    }
}

// Neighbouring pairs of every head of a row, a [heads, columns], turned by the angles of the row; `eps` 1, or -1: backwards.
template <int KIND> void turn_row(const Pass& s, int64_t row) {
    const int64_t half = s.columns / 2;
    const float *cos = s.cos + row * half, *sin = s.sin + row * half;
    const float way = float(s.eps);
    float x[MAX_HEAD], y[MAX_HEAD];
    for (int64_t h = 0; h < s.heads; ++h) {
        const int64_t at = (row * s.heads + h) * s.columns;
        for (int64_t i = 0; i < s.columns; i += L) V::store(x + i, get<KIND>(s.a, at + i));
        for (int64_t i = 0; i < half; ++i) {
            y[2 * i] = x[2 * i] * cos[i] - x[2 * i + 1] * (way * sin[i]);
            y[2 * i + 1] = x[2 * i] * (way * sin[i]) + x[2 * i + 1] * cos[i];
        }
        for (int64_t i = 0; i < s.columns; i += L) set<KIND>(s.out, at + i, V::load(y + i));
    }
}

// Logits a [columns] become their gradient in place, p - (1 at the label); returns -log p(label).
template <int KIND> float learn_row(const Pass& s, int64_t row) {
    const int64_t n = s.columns, at = row * n, label = s.labels[row];
    F most[2] = {V::set(-__builtin_inff()), V::set(-__builtin_inff())};
    for (int64_t i = 0; i < n; i += L) most[i / L % 2] = V::max(most[i / L % 2], get<KIND>(s.a, at + i));
    const float top = V::top(V::max(most[0], most[1]));
    constexpr int64_t SHORT_SUM = 64;  // vectors: what float32 adds up without losing digits
    double mass = 0;
    for (int64_t begin = 0; begin < n; begin += SHORT_SUM * L) {
        F sum = V::zero();
        for (int64_t i = begin; i < begin + SHORT_SUM * L && i < n; i += L)
            sum = V::add(sum, exponential(V::sub(get<KIND>(s.a, at + i), V::set(top))));
        mass += V::sum(sum);
    }
    // Not exp(x - log(mass)): a logarithm of size 10 has lost seven bits, and all numbers of a row would be off together.
    const float loss = float(__builtin_log(mass) - double(number<KIND>(s.a, at + label) - top));
    const F part = V::set(float(1.0 / mass));
    if (!s.by_a) return loss;
    for (int64_t i = 0; i < n; i += L) {
        float p[L];
        V::store(p, V::mul(exponential(V::sub(get<KIND>(s.a, at + i), V::set(top))), part));
        if (label >= i && label < i + L) p[label - i] -= 1.0f;
        set<KIND>(s.by_a, at + i, V::load(p));
    }
    return loss;
}

template <int KIND> void pass_row(const Pass& s, int64_t row) {
    switch (s.what) {
        case NORM: return norm_row<KIND>(s, row);
        case GATE: return gate_row<KIND>(s, row);
        case GATE_BACK: return gate_row_back<KIND>(s, row);
        case TURN: return turn_row<KIND>(s, row);
        default: s.losses[row] = learn_row<KIND>(s, row);
    }
}

inline void pass_over(const Pass& s, const Team& team) {
    #pragma omp parallel num_threads(int(team.threads))
    {
        Crew crew(team, thread_number());
        crew.share((s.rows + PASS_ROWS - 1) / PASS_ROWS, [&](int64_t part) {
            const int64_t end = (part + 1) * PASS_ROWS < s.rows ? (part + 1) * PASS_ROWS : s.rows;
            float* by_weight = s.by_weight ? s.by_weight + part * s.columns : nullptr;
            if (by_weight) std::memset(by_weight, 0, s.columns * sizeof(float));
            for (int64_t row = part * PASS_ROWS; row < end; ++row) {
                if (s.what == NORM_BACK) s.kind == F32 ? norm_row_back<F32>(s, row, by_weight) : norm_row_back<BF16>(s, row, by_weight);
                else s.kind == F32 ? pass_row<F32>(s, row) : pass_row<BF16>(s, row);
            }
        });
    }
}

}  // namespace herd::HERD_ISA
