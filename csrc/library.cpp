// The C functions that Python calls, and the choice of instruction set.
#include <cstring>
#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(HERD_AMX) && !defined(HERD_TILES_EMULATED)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include "api.h"
#include "formats.h"
#include "pack.h"
#include "scratch.h"
#include "values.h"

namespace herd {

namespace scalar { extern const Api api; }
#if defined(__x86_64__)
namespace avx2 { extern const Api api; }
namespace avx512 { extern const Api api; }
namespace avx512bf16 { extern const Api api; }
namespace amx { extern const Api api; }
#elif defined(__aarch64__)
namespace neon { extern const Api api; }
#endif

namespace {

const Api* chosen = &scalar::api;

#if defined(__aarch64__)
bool has_dot_products() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true;  // every Apple processor that runs Python 3.11
#endif
}
#endif

#if defined(HERD_AMX)
// Tiles for bytes, registers that the system saves, and its leave to use them, which the whole process then has.
bool has_tiles() {
#if defined(HERD_TILES_EMULATED)
    return true;
#else
    constexpr unsigned OSXSAVE = 1u << 27, TILE = 1u << 24, INT8 = 1u << 25, STATES = 3u << 17;
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & TILE) || !(d & INT8)) return false;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & STATES) == STATES && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#endif
}
#endif

const Api* offered(const char* name) {
    if (!std::strcmp(name, "scalar")) return &scalar::api;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!std::strcmp(name, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return &avx2::api;
    if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512vnni")) {
        if (!std::strcmp(name, "avx512")) return &avx512::api;
        if (!std::strcmp(name, "avx512bf16") && __builtin_cpu_supports("avx512bf16")) return &avx512bf16::api;
#if defined(HERD_AMX)
        if (!std::strcmp(name, "amx") && __builtin_cpu_supports("avx512bf16") && has_tiles()) return &amx::api;
#endif
    }
#elif defined(__aarch64__)
    if (!std::strcmp(name, "neon") && has_dot_products()) return &neon::api;
#endif
    return nullptr;
}

// Weights are read from front to back, where pages of 4 KiB keep the processor from fetching ahead: asks for large ones before the
// memory is touched. Where the system has none, nothing changes.
void large_pages(uint8_t* p, int64_t n) {
#if defined(__linux__)
    constexpr uintptr_t PAGE = 4096;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(p) + PAGE - 1) / PAGE * PAGE, last = (reinterpret_cast<uintptr_t>(p) + n) / PAGE * PAGE;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)p, (void)n;
#endif
}

const char* fault(const Step& s) {
    int64_t row = 0;
    for (int64_t i = 0; i < s.n_spans; ++i) {
        const Span& span = s.spans[i];
        if (span.row != row || span.rows < 1 || span.rows > s.rows - row) return "spans do not cover the rows one after the other";
        if (span.position < 0 || span.position > s.table_stride * s.block_size - span.rows) return "a span is longer than its table";
        if (span.sequence < 0 || span.sequence >= s.n_sequences) return "a span of no sequence";
        const int32_t* table = s.tables + span.sequence * s.table_stride;
        const int64_t end = span.position + span.rows;
        for (int64_t b = 0; b * s.block_size < end; ++b)
            if (table[b] < 0 || table[b] >= s.n_blocks) return "a table names a block that does not exist";
        for (int64_t p = span.position; p < end; ++p, ++row)
            if (s.slot[row] != table[p / s.block_size] * s.block_size + p % s.block_size) return "a slot is not where the table puts it";
    }
    return row == s.rows ? nullptr : "spans do not cover the rows one after the other";
}

// Eight chains of multiplications, so that one does not wait for the other; `seed` tells equal parts at different places apart.
uint64_t part_sum(const uint8_t* data, int64_t size, uint64_t seed) {
    constexpr uint64_t ODD = 0x9E3779B97F4A7C15ull;
    uint64_t chain[8], words[8];
    for (int j = 0; j < 8; ++j) chain[j] = (seed + 1) * ODD + uint64_t(j);
    for (int64_t at = 0; at < size; at += 64) {
        const int64_t n = size - at < 64 ? size - at : 64;
        if (n < 64) std::memset(words, 0, sizeof words);
        std::memcpy(words, data + at, n);
        for (int j = 0; j < 8; ++j) {
            const uint64_t h = chain[j] ^ words[j];
            chain[j] = (h << 27 | h >> 37) * ODD;
        }
    }
    uint64_t sum = 0;
    for (uint64_t c : chain) sum = ((sum ^ c) << 31 | (sum ^ c) >> 33) * ODD;
    return sum;
}

}  // namespace
}  // namespace herd

using namespace herd;

#define HERD_PUBLIC __attribute__((visibility("default")))
extern "C" {

// A checksum of `size` bytes: every change of one word changes it, and damage of more goes unseen once in 2^64. Parts of PART bytes
// are summed side by side, so the number of threads does not matter.
HERD_PUBLIC uint64_t herd_checksum(const uint8_t* data, int64_t size, int threads) {
    constexpr int64_t PART = 1 << 20;
    const int64_t parts = (size + PART - 1) / PART;
    uint64_t total = uint64_t(size);
    #pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(+ : total)
    for (int64_t i = 0; i < parts; ++i)
        total += part_sum(data + i * PART, size - i * PART < PART ? size - i * PART : PART, uint64_t(i));
    return total;
}

// 1 when this processor and build have the instruction set `name`, which is then used.
HERD_PUBLIC int herd_use(const char* name) {
    const Api* api = offered(name);
    if (api) chosen = api;
    return api != nullptr;
}

HERD_PUBLIC int64_t herd_packed_bytes(int format, int64_t rows, int64_t columns) {
    return (rows + PANEL - 1) / PANEL * panel_bytes(format, columns);
}

HERD_PUBLIC void herd_pack(int format, const uint8_t* source, int64_t rows, int64_t columns, uint8_t* out, int threads) {
    const int64_t panels = (rows + PANEL - 1) / PANEL, size = panel_bytes(format, columns);
    large_pages(out, panels * size);
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t p = 0; p < panels; ++p) pack(format, source, rows, columns, p, p + 1, out + p * size);
}

// Blocks of [rows, columns] -> the numbers they stand for.
HERD_PUBLIC void herd_values(int format, const uint8_t* blocks, int64_t rows, int64_t columns, float* out, int threads) {
    constexpr int64_t PART = 256;  // blocks that are done before a second thread would have begun
    const Layout l = layout(format);
    const int64_t n = rows * (columns / l.columns), parts = (n + PART - 1) / PART;
    if (parts < 2) return values(format, blocks, n, out);
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t p = 0; p < parts; ++p)
        values(format, blocks + p * PART * l.block, n - p * PART < PART ? n - p * PART : PART, out + p * PART * l.columns);
}

HERD_PUBLIC int herd_version() { return VERSION; }

HERD_PUBLIC int64_t herd_matmul_scratch(const Matrix* m, int64_t rows, int threads) {
    MatmulBuffers b;
    return lay_out(*m, rows, threads, nullptr, b);
}

// `scratch`: herd_matmul_scratch bytes, at a multiple of 64.
HERD_PUBLIC void herd_matmul(const Matrix* m, const float* x, int64_t rows, float* y, int threads, uint8_t* scratch) {
    MatmulBuffers b;
    lay_out(*m, rows, threads, scratch, b);
    chosen->matmul(*m, x, rows, y, b);
}

HERD_PUBLIC int64_t herd_head_scratch(const Head* h, int64_t rows, int threads) {
    MatmulBuffers b;
    return lay_out(h->output, rows, threads, nullptr, b, true);
}

// Logits of the rows `index` [rows] of x. `scratch`: herd_head_scratch bytes, at a multiple of 64.
HERD_PUBLIC void herd_head(const Head* h, const float* x, const int64_t* index, int64_t rows, float* y, int threads, uint8_t* scratch) {
    MatmulBuffers b;
    lay_out(h->output, rows, threads, scratch, b, true);
    chosen->head(*h, x, index, rows, y, b);
}

HERD_PUBLIC int64_t herd_forward_scratch(const Model* m, const Step* s, int threads) {
    Buffers b;
    return lay_out(*m, *s, threads, nullptr, b);
}

// Null, or what is wrong with the step, which then has not run: a wrong slot would overwrite memory that is not the cache's.
HERD_PUBLIC const char* herd_forward(const Model* m, const Step* s, int threads, uint8_t* scratch) {
    if (const char* wrong = fault(*s)) return wrong;
    Buffers b;
    lay_out(*m, *s, threads, scratch, b);
    chosen->forward(*m, *s, b);
    return nullptr;
}

HERD_PUBLIC int64_t herd_documents_scratch(const Documents* d, int backward, int threads) {
    DocumentBuffers b;
    return lay_out(*d, backward, threads, nullptr, b);
}

// Attention of all documents (or its gradients), which `begins` says one after the other: the caller made it so.
HERD_PUBLIC void herd_documents(const Documents* d, int backward, int threads, uint8_t* scratch) {
    DocumentBuffers b;
    lay_out(*d, backward, threads, scratch, b);
    (backward ? chosen->documents_backward : chosen->documents)(*d, b);
}

HERD_PUBLIC int64_t herd_dense_scratch(const Dense* d, int threads) {
    DenseBuffers b;
    return lay_out(*d, threads, nullptr, b);
}

HERD_PUBLIC void herd_dense(const Dense* d, int threads, uint8_t* scratch) {
    DenseBuffers b;
    lay_out(*d, threads, scratch, b);
    chosen->dense(*d, b);
}

HERD_PUBLIC int64_t herd_pass_scratch(int threads) {
    Team team;
    return lay_out(threads, nullptr, team);
}

HERD_PUBLIC void herd_pass(const Pass* p, int threads, uint8_t* scratch) {
    Team team;
    lay_out(threads, scratch, team);
    chosen->pass_over(*p, team);
}

}
