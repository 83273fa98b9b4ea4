// What the two sides of the border agree on. Plain C layout: herd/kernels/native.py describes the same structures to ctypes.
// VERSION changes with every change here and of the functions in library.cpp, so that a library built from older sources is refused
// instead of misread.
#pragma once
#include <cstdint>

namespace herd {

constexpr int VERSION = 7;

struct Matrix {            // [rows, cols]; quantized formats in panels, F32 / F16 / BF16 row by row
    const uint8_t* data;
    int64_t rows, cols;
    int64_t format;
};

enum Placement : int64_t { ROPE = 0, ROPE_NORM = 1, NONE = 2, TEMPERED = 3 };

struct Layer {
    const float* attention_norm;
    const float* ffn_norm;
    Matrix wq, wk, wv, wo, w1, w2, w3;  // w1 to w3: the feed-forward, or the expert that all tokens share
    int64_t placement;
    int64_t chunk;            // 0: none
    int64_t n_experts, top_k; // 0: dense
    Matrix router;            // [n_experts, dim], plain
    const Matrix* experts;    // w1, w2, w3 of each
};

struct Model {
    int64_t dim, n_layers, n_heads, n_kv_heads, head_dim;
    double norm_eps;
    const Layer* layers;
};

struct Head {              // the last norm and the output matrix
    Matrix output;
    const float* norm;
    double norm_eps;
};

struct Span {              // rows of one sequence that lie side by side, at neighbouring positions
    int64_t row, rows, position, sequence;
};

struct Step {
    int64_t rows;
    float* x;              // [rows, dim] in and out
    const float* cos;      // [rows, head_dim / 2]
    const float* sin;
    const float* temper;   // [rows]: what tempered layers multiply queries by
    const int64_t* slot;   // [rows]: block * block_size + offset
    const Span* spans;     // in row order; together they cover every row once
    int64_t n_spans;
    const int32_t* tables; // [n_sequences, table_stride]
    int64_t n_sequences, table_stride;
    int64_t n_blocks, block_size;
    int64_t kv_kind;       // F32, F16, BF16 or I8
    uint8_t* const* k;     // per layer [n_blocks, block_size, n_kv_heads, head_dim]
    uint8_t* const* v;
    float* const* k_scale; // per layer [n_blocks, block_size, n_kv_heads]; I8 only
    float* const* v_scale;
    int64_t first_layer, last_layer;
};

// One pass over rows of numbers, columns a multiple of 16: what it does, and of its operands those that it needs.
enum What : int64_t { NORM = 0, NORM_BACK = 1, GATE = 2, GATE_BACK = 3, TURN = 4, LEARN = 5 };

struct Pass {
    int64_t what, kind;    // kind: F32 or BF16, of all bytes below
    int64_t rows, columns;
    int64_t heads;         // of a row that is turned; columns are those of a head, MAX_HEAD at most
    double eps;            // of a norm; of a turn 1, or -1 for its gradient
    const uint8_t* a;
    const uint8_t* b;
    const uint8_t* weight; // [columns]
    uint8_t* out;
    float* scales;         // [rows]: of a norm
    const uint8_t* grad;
    uint8_t* by_a;
    uint8_t* by_b;
    float* by_weight;      // [parts of PASS_ROWS rows, columns], or null
    const float* cos;      // [rows, columns / 2]
    const float* sin;
    const int64_t* labels; // [rows], each a column
    float* losses;         // [rows]
};

constexpr int64_t PASS_ROWS = 32, MAX_HEAD = 1024;

struct Documents {         // attention of documents that lie back to back, and its gradients
    int64_t kind;          // F32 or BF16: q, k, v, out, grad, by_k and by_v
    int64_t heads, kv_heads, head_dim;
    const int64_t* begins; // [n_documents + 1]: where each begins, and where the last one ends
    int64_t n_documents;
    const uint8_t* q;      // [rows, heads, head_dim]
    const uint8_t* k;      // [rows, kv_heads, head_dim]
    const uint8_t* v;
    uint8_t* out;          // [rows, heads, head_dim]
    float* sums;           // [rows, heads]: logarithm of the sum of exponentials
    const uint8_t* grad;   // [rows, heads, head_dim]
    float* by_q;           // likewise
    uint8_t* by_k;         // [rows, kv_heads, head_dim]
    uint8_t* by_v;
};

struct Dense {             // c [rows, columns] = a [rows, inner] b [inner, columns], or added to what c holds; strides in numbers
    int64_t rows, columns, inner, add;
    const float* a;
    int64_t a_row, a_inner;
    const float* b;
    int64_t b_inner, b_column;
    float* c;
    int64_t c_row;
};

}  // namespace herd
