// Products of float32 matrices of any strides, as training needs them: outputs, and gradients by inputs and by weights, where one
// operand or both lie the other way round.
//
// Both operands are copied into slivers first, in the order in which they are multiplied: DOWN rows of a, ACROSS columns of b, index
// by index of the sum. Slivers of a stay in the second-level cache while those of b pass. An output is a sum over blocks of the inner
// index, whose length depends on the inner length alone, and inside a block one chain in its order: the bits of a row of the result
// depend on its row of a and on b, and on nothing that is computed beside it.
#pragma once
#include "crew.h"
#include "rows.h"

namespace herd::HERD_ISA {

// Sums held in registers: 14 x 2 vectors of 16, 6 x 2 of 8 (of 16 registers), 12 x 2 of 4.
constexpr int DOWN = L == 16 ? 14 : L == 8 ? 6 : L == 4 ? 12 : 4, ACROSS = 2 * L;

// R rows of a sliver, from c: c (+)= a b. Lines that will be written are fetched while sums are made, one row after the other: all at
// once they would keep lines of b waiting.
template <int R> void dense_tile(int64_t n, const float* a, const float* b, float* c, int64_t stride, bool add) {
    constexpr int AHEAD = 16;  // of the inner index: lines of b come from the third-level cache
    F sum[R][2];
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = V::zero();
    const int64_t some = n / (R + 1);
    for (int64_t part = 0; part <= R; ++part) {
        if (part < R)
            for (int j = 0; j < ACROSS; j += 16) __builtin_prefetch(c + part * stride + j, 1, 3);
        const int64_t end = part < R ? some : n - R * some;
        for (int64_t i = 0; i < end; ++i, a += DOWN, b += ACROSS) {
            const F left = V::load(b), right = V::load(b + L);
            for (int j = 0; j < ACROSS; j += 16) __builtin_prefetch(b + AHEAD * ACROSS + j, 0, 3);
            for (int r = 0; r < R; ++r) {
                const F x = V::set(a[r]);
                sum[r][0] = V::fma(x, left, sum[r][0]);
                sum[r][1] = V::fma(x, right, sum[r][1]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < 2; ++j) {
            float* to = c + r * stride + j * L;
            V::store(to, add ? V::add(V::load(to), sum[r][j]) : sum[r][j]);
        }
}

template <int R> void dense_rows(int64_t rows, int64_t n, const float* a, const float* b, float* c, int64_t stride, bool add) {
    if (rows == R) return dense_tile<R>(n, a, b, c, stride, add);
    if constexpr (R > 1) dense_rows<R - 1>(rows, n, a, b, c, stride, add);
}

// A tile that may be narrower than a sliver.
inline void dense_tile_at(int64_t rows, int64_t columns, int64_t n, const float* a, const float* b, float* c, int64_t stride, bool add) {
    if (columns == ACROSS) return dense_rows<DOWN>(rows, n, a, b, c, stride, add);
    float whole[DOWN * ACROSS];
    dense_rows<DOWN>(rows, n, a, b, whole, ACROSS, false);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < columns; ++j) c[r * stride + j] = add ? c[r * stride + j] + whole[r * ACROSS + j] : whole[r * ACROSS + j];
}

// Lines (rows of a, columns of b) of length n to slivers: out [ceil(lines / W), n, W], zeros where there are no lines. Numbers lie
// `line` apart from line to line and `step` along it. Vectors may be stored beyond a sliver's last line: what comes next goes over
// that. What is read next is fetched: in rows far apart the processor does not do so by itself.
template <int W> void sliver(const float* x, int64_t line, int64_t step, int64_t lines, int64_t n, float* out) {
    constexpr int64_t AHEAD = 32;
    int64_t i = 0;
    for (; lines >= W && step == 1 && i + L <= n; i += L)
        for (int j = 0; j < W; j += L) {
            F square[L];
            for (int k = 0; k < L; ++k) {
                const float* from = x + (j + k < W ? j + k : W - 1) * line + i;
                square[k] = V::load(from);
                __builtin_prefetch(from + AHEAD, 0, 3);
            }
            V::turn(square);
            for (int k = 0; k < L; ++k) V::store(out + (i + k) * W + j, square[k]);
        }
    for (; i < n; ++i)
        for (int64_t j = 0; j < W; ++j) out[i * W + j] = j < lines ? x[j * line + i * step] : 0;
}

template <int W> void slivers(const float* x, int64_t line, int64_t step, int64_t lines, int64_t n, float* out) {
    constexpr int64_t AHEAD = 8;
    int64_t done = 0;
    if (line == 1) {
        done = lines / W * W;
        for (int64_t i = 0; i < n; ++i) {
            const float* from = x + i * step;
            for (int64_t j = 0; j < done; j += 16) __builtin_prefetch(from + AHEAD * step + j, 0, 3);
            for (int64_t j = 0; j < done; j += W) std::memcpy(out + j * n + i * W, from + j, W * sizeof(float));
        }
    }
    for (; done < lines; done += W) sliver<W>(x + done * line, line, step, lines - done, n, out + done * n);
}

// c [rows, columns] (+)= a [rows, inner] b [inner, columns]
inline void dense(const Dense& d, const DenseBuffers& buffers) {
    #pragma omp parallel num_threads(int(buffers.team.threads))
    {
        Crew crew(buffers.team, thread_number());
        float* own = buffers.rows + thread_number() * buffers.own;
        // Blocks of rows are as even as tiles allow: the last one would otherwise be short, and its thread early.
        const int64_t tiles = (d.rows + DOWN - 1) / DOWN, most = DENSE_ROWS / DOWN, blocks = (tiles + most - 1) / most;
        const auto at_row = [&](int64_t block) { return block < blocks ? tiles * block / blocks * DOWN : d.rows; };
        for (int64_t column = 0; column < d.columns; column += DENSE_COLUMNS) {
            const int64_t wide = d.columns - column < DENSE_COLUMNS ? d.columns - column : DENSE_COLUMNS;
            const int64_t strips = (wide + ACROSS - 1) / ACROSS, group = crew.threads() == 1 ? strips : (DENSE_GROUP + ACROSS - 1) / ACROSS;
            const int64_t groups = (strips + group - 1) / group;
            for (int64_t from = 0; from < d.inner; from += buffers.depth) {
                const int64_t n = d.inner - from < buffers.depth ? d.inner - from : buffers.depth;
                const float* b = d.b + from * d.b_inner + column * d.b_column;
                crew.share_singly((wide + DENSE_GROUP - 1) / DENSE_GROUP, [&](int64_t part) {
                    const int64_t j = part * DENSE_GROUP, some = wide - j < DENSE_GROUP ? wide - j : DENSE_GROUP;
                    slivers<ACROSS>(b + j * d.b_column, d.b_column, d.b_inner, some, n, buffers.columns + j * n);
                });
                int64_t held = -1;  // the block of rows whose slivers this thread has
                crew.share_singly(blocks * groups, [&](int64_t item) {
                    const int64_t block = item / groups, first = at_row(block), tall = at_row(block + 1) - first;
                    if (block != held) slivers<DOWN>(d.a + first * d.a_row + from * d.a_inner, d.a_row, d.a_inner, tall, n, own);
                    held = block;
                    const int64_t begin = item % groups * group, end = begin + group < strips ? begin + group : strips;
                    for (int64_t s = begin; s < end; ++s) {
                        const int64_t j = s * ACROSS, some = wide - j < ACROSS ? wide - j : ACROSS;
                        for (int64_t r = 0; r < tall; r += DOWN)
                            dense_tile_at(tall - r < DOWN ? tall - r : DOWN, some, n, own + r * n, buffers.columns + j * n,
                                          d.c + (first + r) * d.c_row + column + j, d.c_row, d.add || from > 0);
                    }
                });
            }
        }
    }
}

}  // namespace herd::HERD_ISA
