// One panel of a product, whatever the weight is stored as, and the forms its inputs must have.
#pragma once
#include "crew.h"
#include "plain.h"

namespace herd::HERD_ISA {

inline bool quantized(const Matrix& m) { return m.format != F32 && m.format != F16 && m.format != BF16; }

// Rows that several matrices read are in one form beside floats: bytes if any is quantized, and then bfloat16 reads the floats.
template <typename... M> inline Form form_of(const M&... m) {
    if ((quantized(m) || ...)) return BYTES;
#ifdef HERD_BRAINS
    if (((m.format == BF16) || ...)) return BRAINS;
#endif
    return FLOATS;
}

inline int64_t panels(const Matrix& m) { return (m.rows + PANEL - 1) / PANEL; }

inline Acts shaped(const Acts& storage, int64_t columns) { return {storage.data, columns, record_stride(columns)}; }

// Rows that a product reads: floats (filled unless BRAINS is what the only reader wants), and `acts` in `form`.
struct Inputs {
    const float* x;
    Acts acts;
    Form form;
    Inputs from(int64_t row) const {
        return {x + row * acts.columns, {acts.data + row * acts.stride, acts.columns, acts.stride}, form};
    }
};

// Rows [first, last) of a plain m: y [rows, stride], the first of them at y.
inline void plain(const Matrix& m, int64_t first, int64_t last, const Inputs& in, int64_t rows, float* y, int64_t stride) {
#ifdef HERD_BRAINS
    if (m.format == BF16 && in.form == BRAINS)
        return plain_rows_of<Paired>(m, first, last, in.acts.data, in.acts.stride, rows, y, stride);
#endif
    plain_rows(m, first, last, in.x, rows, y, stride);
}

inline void panel_of(int64_t format, const uint8_t* w, const Acts& a, int64_t rows, float* y, int64_t stride) {
    switch (format) {
        case Q4_0: return panel<Q4_0>(w, a, rows, y, stride);
        case Q8_0: return panel<Q8_0>(w, a, rows, y, stride);
        case Q4_K: return panel<Q4_K>(w, a, rows, y, stride);
        case Q5_K: return panel<Q5_K>(w, a, rows, y, stride);
        case Q6_K: return panel<Q6_K>(w, a, rows, y, stride);
    }
}

// Plain weights meet inputs in tiles so large that these may come from the third-level cache.
inline int64_t pieces(const Inputs& in, int64_t rows) {
    const int64_t n = in.form == BYTES ? PIECE / in.acts.stride / MIN_PIECE * MIN_PIECE : MAX_PIECE;
    const int64_t most = n < MIN_PIECE ? MIN_PIECE : n > MAX_PIECE ? MAX_PIECE : n;
    return (rows + most - 1) / most;
}

// Pieces are of one size but for a few rows: threads that take the same number of them are done at the same time.
inline int64_t piece_rows(const Inputs& in, int64_t rows) {
    const int64_t n = pieces(in, rows);
    return n ? ((rows + n - 1) / n + PIECE_STEP - 1) / PIECE_STEP * PIECE_STEP : PIECE_STEP;
}

// Panel `p` of inputs @ m^T, its 16 columns at y [rows, stride]. Where m ends inside the panel, the columns behind are written
// too if there is room for them, and otherwise go by way of `spare` [rows, PANEL].
inline void product(const Matrix& m, int64_t p, const Inputs& in, int64_t rows, float* y, int64_t stride, float* spare) {
    const int64_t first = p * PANEL, n = m.rows - first < PANEL ? m.rows - first : PANEL;
    if (!quantized(m)) return plain(m, first, first + n, in, rows, y, stride);
    const uint8_t* w = m.data + p * panel_bytes(int(m.format), m.cols);
    if (n == PANEL || !spare) return panel_of(m.format, w, in.acts, rows, y, stride);
    panel_of(m.format, w, in.acts, rows, spare, PANEL);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(y + r * stride, spare + r * PANEL, n * sizeof(float));
}

// Panels that one thread takes at a time, of `all`: few enough that there is something for everybody to the end.
inline int64_t block_of(int64_t all, int64_t threads) {
    const int64_t n = all / threads / PER_THREAD;
    return n < 1 ? 1 : n < MAX_BLOCK ? n : MAX_BLOCK;
}

inline int64_t blocks(const Matrix& m, int64_t block) { return (panels(m) + block - 1) / block; }

// Piece and block `i` of y [rows, m.rows] = inputs @ m^T; there are pieces(in, rows) * blocks(m, block).
inline void product_block(const Matrix& m, int64_t i, int64_t block, const Inputs& all, int64_t rows, float* y, float* spare, const Turn& turn) {
    const int64_t size = piece_rows(all, rows), n = blocks(m, block), first = i / n * size, begin = i % n * block;
    const int64_t count = rows - first < size ? rows - first : size, end = begin + block < panels(m) ? begin + block : panels(m);
    const Inputs in = all.from(first);
    float* to = y + first * m.rows + begin * PANEL;
    for (int64_t p = begin; p < end; ++p) {
        const int64_t at = (p - begin) * PANEL;
        if (turn.alone()) product(m, p, in, count, to + at, m.rows, spare);
        else product(m, p, in, count, spare + at, block * PANEL, nullptr);
    }
    if (turn.alone() || !turn.mine()) return;
    const int64_t width = (end * PANEL < m.rows ? end * PANEL : m.rows) - begin * PANEL;
    for (int64_t r = 0; r < count; ++r) std::memcpy(to + r * m.rows, spare + r * block * PANEL, width * sizeof(float));
}

// y [rows, m.rows] = inputs @ m^T by the whole crew.
inline void product_of(Crew& crew, const Matrix& m, const Inputs& in, int64_t rows, float* y, float* spare) {
    const int64_t n = pieces(in, rows), block = block_of(n * panels(m), crew.threads());
    crew.retake(n * blocks(m, block), [&](int64_t i, const Turn& turn) { product_block(m, i, block, in, rows, y, spare, turn); });
}

}  // namespace herd::HERD_ISA
