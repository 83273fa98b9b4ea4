#include "scratch.h"
#include <algorithm>
#include <cstring>

namespace herd {
namespace {

constexpr int64_t LINE = 64;  // a cache line: no two threads write to the same one through different buffers

class Arena {
public:
    explicit Arena(uint8_t* base) : base_(base) {}
    template <typename T> T* take(int64_t n) {
        T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
        used_ += (n * int64_t(sizeof(T)) + LINE - 1) / LINE * LINE;
        return p;
    }
    int64_t used() const { return used_; }

private:
    uint8_t* base_;
    int64_t used_ = 0;
};

Acts take_acts(Arena& arena, int64_t rows, int64_t columns) {
    const int64_t stride = record_stride(columns);
    return {arena.take<uint8_t>(rows * stride), columns, stride};
}

Team take_team(Arena& arena, int64_t phases, int threads) {
    if (threads == 1) return {1, nullptr, nullptr, nullptr, nullptr};
    const int64_t n = phases * threads + phases + threads + 1;
    Count* all = arena.take<Count>(n);
    if (all) std::memset(static_cast<void*>(all), 0, n * sizeof(Count));
    return {threads, all, all + phases * threads, all + phases * threads + phases, all + n - 1};
}

bool plain(const Matrix& m) { return m.format == F32 || m.format == F16 || m.format == BF16; }

}  // namespace

int64_t lay_out(const Model& m, const Step& s, int threads, uint8_t* base, Buffers& b) {
    int64_t hidden = 0, experts = 0, top_k = 0, jobs = 0;
    bool floats = false;
    for (int64_t i = s.first_layer; i < s.last_layer; ++i) {
        const Layer& l = m.layers[i];
        hidden = std::max(hidden, l.w1.rows);
        floats |= plain(l.w2);
        if (!l.n_experts) continue;
        experts = std::max(experts, l.n_experts);
        top_k = std::max(top_k, l.top_k);
        hidden = std::max(hidden, l.experts[0].rows);
        floats |= plain(l.experts[1]);
        const int64_t strips = (l.experts[0].rows + ACT_GROUP - 1) / ACT_GROUP, panels = (m.dim + PANEL - 1) / PANEL;
        // Pieces of MIN_PIECE rows or more, and a last one per expert that may be shorter.
        const int64_t pieces = std::min(l.n_experts, s.rows * l.top_k) + s.rows * l.top_k / MIN_PIECE;
        jobs = std::max(jobs, pieces * std::max(strips, panels));
    }
    const int64_t T = s.rows, places = T * std::max<int64_t>(1, top_k);
    const int64_t heads = m.n_heads * m.head_dim, kv = m.n_kv_heads * m.head_dim, narrow = std::max(m.dim, heads);
    Arena arena(base);
    b.team = take_team(arena, (s.last_layer - s.first_layer) * LAYER_PHASES + 1, threads);
    const int64_t together = std::max<int64_t>(1, MAX_QUERIES / (m.n_heads / m.n_kv_heads));
    b.n_tasks = 0;
    for (int64_t i = 0; i < s.n_spans; ++i) b.n_tasks += (s.spans[i].rows + together - 1) / together;
    b.tasks = arena.take<Task>(b.n_tasks);
    if (base) {
        Task* t = b.tasks;
        for (int64_t i = 0; i < s.n_spans; ++i) {
            const Span& span = s.spans[i];
            for (int64_t r = 0; r < span.rows; r += together)
                *t++ = {span.row + r, std::min(together, span.rows - r), span.position + r, span.sequence};
        }
    }
    b.normed = arena.take<float>(T * narrow);
    b.q = arena.take<float>(T * heads);
    b.k = arena.take<float>(T * kv);
    b.v = arena.take<float>(T * kv);
    b.out = arena.take<float>(T * m.dim);
    b.gated = arena.take<float>(floats ? places * hidden : 0);
    b.narrow = take_acts(arena, places, narrow);
    b.wide = take_acts(arena, places, hidden);
    const int64_t strips = std::min(places, MAX_PIECE) * std::max<int64_t>(2 * ACT_GROUP, MAX_BLOCK * PANEL), attention = (MAX_QUERIES + 2 * m.head_dim) * TILE;
    b.spare_floats = std::max(strips, attention);
    b.spare = arena.take<float>(threads * b.spare_floats);
    b.scaled = arena.take<float>(top_k ? places * m.dim : 0);
    b.routed = arena.take<float>(top_k ? places * m.dim : 0);
    b.logits = arena.take<float>(T * experts);
    b.score = arena.take<float>(T * top_k);
    b.chosen = arena.take<int64_t>(T * top_k);
    b.place = arena.take<int64_t>(T * top_k);
    b.begin = arena.take<int64_t>(experts + 1);
    b.next = arena.take<int64_t>(experts);
    b.up = arena.take<Job>(jobs);
    b.down = arena.take<Job>(jobs);
    b.n_up = arena.take<int64_t>(1);
    b.n_down = arena.take<int64_t>(1);
    return arena.used();
}

int64_t lay_out(const Matrix& m, int64_t rows, int threads, uint8_t* base, MatmulBuffers& b, bool head) {
    Arena arena(base);
    b.team = take_team(arena, 2, threads);
    b.normed = arena.take<float>(head ? rows * m.cols : 0);
    b.acts = take_acts(arena, m.format == F32 || m.format == F16 ? 0 : rows, m.cols);
    b.spare_floats = std::min(rows, MAX_PIECE) * PANEL * MAX_BLOCK;
    b.spare = arena.take<float>(threads * b.spare_floats);
    return arena.used();
}

int64_t lay_out(const Documents& d, bool backward, int threads, uint8_t* base, DocumentBuffers& b) {
    const int64_t rows = d.begins[d.n_documents], dim = d.head_dim;
    int64_t places = 0;
    b.n_passages = 0;
    for (int64_t i = 0; i < d.n_documents; ++i) {
        const int64_t n = d.begins[i + 1] - d.begins[i];
        b.n_passages += (n + TILE - 1) / TILE;
        places += n / TILE * TILE + whole_lines(n % TILE);
    }
    Arena arena(base);
    b.team = take_team(arena, 2, threads);
    b.passages = arena.take<Passage>(b.n_passages);
    b.firsts = arena.take<int64_t>(d.n_documents + 1);
    if (base) {
        int64_t at = 0, place = 0;
        for (int64_t i = 0; i < d.n_documents; ++i) {
            b.firsts[i] = at;
            for (int64_t row = d.begins[i]; row < d.begins[i + 1]; row += TILE) {
                const int64_t n = std::min<int64_t>(TILE, d.begins[i + 1] - row);
                b.passages[at++] = {row, n, b.firsts[i], place};
                place += whole_lines(n);
            }
        }
        b.firsts[d.n_documents] = at;
    }
    b.keys = arena.take<float>(backward ? 0 : places * d.kv_heads * dim);
    b.values = arena.take<float>(backward ? 0 : places * d.kv_heads * dim);
    b.delta = arena.take<float>(backward ? rows * d.heads : 0);
    b.spare_floats = backward ? 7 * TILE * dim + 2 * TILE * TILE : 2 * TILE * dim + TILE * TILE;
    b.spare = arena.take<float>(threads * b.spare_floats);
    return arena.used();
}

int64_t lay_out(int threads, uint8_t* base, Team& team) {
    Arena arena(base);
    team = take_team(arena, 1, threads);
    return arena.used();
}

int64_t lay_out(const Dense& d, int threads, uint8_t* base, DenseBuffers& b) {
    constexpr int64_t WIDEST = 32, LANES = 16;  // of a sliver; that a vector stores
    const int64_t parts = std::max<int64_t>(1, (d.inner + DENSE_DEPTH - 1) / DENSE_DEPTH);
    b.depth = ((d.inner + parts - 1) / parts + LANES - 1) / LANES * LANES;
    const int64_t stretches = (d.columns + DENSE_COLUMNS - 1) / DENSE_COLUMNS;
    Arena arena(base);
    b.team = take_team(arena, 2 * parts * stretches + 1, threads);
    b.columns = arena.take<float>((std::min(d.columns, DENSE_COLUMNS) + WIDEST) * b.depth);
    b.own = (std::min(d.rows, DENSE_ROWS) + LANES) * b.depth + LANES;
    b.rows = arena.take<float>(threads * b.own);
    return arena.used();
}

}  // namespace herd
