// Working memory of one call, carved from one allocation that the caller makes and frees. So nothing here can throw, two
// threads may call at once, and no memory outlives the call that needed it.
//
// Everything that instruction sets share is plain data, filled by scratch.cpp: an inline function in a header that is compiled
// with AVX-512 flags could be the copy the linker keeps for everybody.
#pragma once
#include "abi.h"
#include "formats.h"

namespace herd {

constexpr int TILE = 64;          // keys that are scored together
constexpr int MAX_QUERIES = 64;   // query rows x heads of a group that are answered together

// Rows of a product are taken in pieces whose inputs stay in the second-level cache, while weights, which are read once per
// piece, stream past. All are multiples of PIECE_STEP.
constexpr int64_t PIECE = 640 << 10;  // bytes
constexpr int64_t MIN_PIECE = 24, MAX_PIECE = 240, PIECE_STEP = 4;  // rows

// Rows of activations, quantized. A row is a record of RECORD bytes per GROUP of columns: the bytes, and what the products need
// of them beside: sums times what each format's numbers are offset by, the sum itself, and the scale of the ACT_GROUP.
struct Acts {
    uint8_t* data;
    int64_t columns, stride;      // bytes from row to row
};
constexpr int RECORD = 64, REC_8 = 32, REC_128 = 36, REC_32 = 40, REC_SUM = 48, REC_SCALE = 52;  // REC_32: of either half

// An odd number of cache lines: rows a power of two apart would all compete for the same few places in the cache.
static inline int64_t record_stride(int64_t columns) { return ((columns + GROUP - 1) / GROUP | 1) * RECORD; }

// What the threads of a call know of each other (crew.h), all zero when it begins. Phases are numbered through the call.
struct alignas(64) Count { int64_t value; };
struct Team {
    int64_t threads;
    Count *taken, *done, *slot, *over;  // [phases, threads], [phases], [threads], [1]
};
constexpr int64_t LAYER_PHASES = 16;  // at most
constexpr int64_t MAX_BLOCK = 16;     // panels that one thread takes at a time

struct Task { int64_t row, rows, position, sequence; };  // query rows that are answered together
struct Job { int64_t expert, part; };

struct Buffers {
    Team team;
    int64_t n_tasks;
    Task* tasks;
    float *normed, *q, *k, *v, *out;   // [rows, their width]
    float *gated;                      // [places, hidden]: where w2 reads floats
    Acts narrow, wide;                 // of inputs as wide as the model (or its heads); of what w2 reads. `columns` is the widest
    float *spare;                      // per thread: odd panels, strips of the gate, attention
    int64_t spare_floats;
    // Experts: places are rows x top_k, sorted by expert.
    float *scaled, *routed;            // [places, dim]
    float *logits, *score;             // [rows, experts], [rows, top_k]
    int64_t *chosen, *place, *begin, *next;  // [rows, top_k] twice, [experts + 1], [experts]
    Job *up, *down;
    int64_t *n_up, *n_down;
};

struct MatmulBuffers {
    Team team;
    float* normed;                     // [rows, columns]: of a head
    Acts acts;
    float* spare;
    int64_t spare_floats;
};

struct Passage { int64_t row, rows, first, place; };  // a block of a document; its first block; its place among turned keys, in positions

struct DocumentBuffers {
    Team team;
    int64_t n_passages;
    Passage* passages;
    int64_t* firsts;                   // [documents + 1]: the first passage of each
    float *keys, *values;              // of all passages: per key head turned [head_dim, whole lines of rows], and as they are
    float* delta;                      // [rows, heads]; of the gradients only
    float* spare;
    int64_t spare_floats;
};

// A product of training: b in slivers, and those rows of a that a thread is at. DENSE_ROWS is a multiple of every DOWN but 14's, which
// takes 98. Numbers are chosen for 1 MB of second-level cache; the inner index is cut into equal parts of at most DENSE_DEPTH.
constexpr int64_t DENSE_ROWS = 108, DENSE_DEPTH = 640, DENSE_COLUMNS = 3072, DENSE_GROUP = 64;
struct DenseBuffers {
    Team team;
    int64_t depth;
    float* columns;
    float* rows;                       // per thread `own`
    int64_t own;
};

// Rows of keys that lie side by side as columns: whole lines, and so whole vectors of every instruction set.
static inline int64_t whole_lines(int64_t rows) { return (rows + 15) / 16 * 16; }

// Lays the buffers out from `base` and returns how many bytes they take; with base == nullptr it only counts.
int64_t lay_out(const Model& m, const Step& s, int threads, uint8_t* base, Buffers& b);
int64_t lay_out(const Matrix& m, int64_t rows, int threads, uint8_t* base, MatmulBuffers& b, bool head = false);
int64_t lay_out(const Documents& d, bool backward, int threads, uint8_t* base, DocumentBuffers& b);
int64_t lay_out(int threads, uint8_t* base, Team& team);
int64_t lay_out(const Dense& d, int threads, uint8_t* base, DenseBuffers& b);

}  // namespace herd
