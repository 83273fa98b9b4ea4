// What the two sides of the border agree on. Plain C layout: herd/kernels/native.py describes the same structures to ctypes.
// VERSION changes with every change here and of the functions in library.cpp, so that a library built from older sources is refused
// instead of misread.
#pragma once
#include <cstdint>

namespace herd {

constexpr int VERSION = 5;

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

}  // namespace herd
