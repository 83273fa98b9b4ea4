// The C functions that Python calls, and the choice of instruction set.
#include <cstring>
#include <omp.h>
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#include "api.h"
#include "formats.h"
#include "pack.h"

namespace herd {

namespace scalar { extern const Api api; }
#if defined(__x86_64__)
namespace avx2 { extern const Api api; }
namespace avx512 { extern const Api api; }
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

const Api* offered(const char* name) {
    if (!std::strcmp(name, "scalar")) return &scalar::api;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!std::strcmp(name, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return &avx2::api;
    if (!std::strcmp(name, "avx512") && __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512vnni"))
        return &avx512::api;
#elif defined(__aarch64__)
    if (!std::strcmp(name, "neon") && has_dot_products()) return &neon::api;
#endif
    return nullptr;
}

}  // namespace
}  // namespace herd

using namespace herd;

extern "C" {

// 1 when this processor and build have the instruction set `name`, which is then used.
int herd_use(const char* name) {
    const Api* api = offered(name);
    if (api) chosen = api;
    return api != nullptr;
}

int64_t herd_packed_bytes(int format, int64_t rows, int64_t columns) {
    return (rows + PANEL - 1) / PANEL * panel_bytes(format, columns);
}

void herd_pack(int format, const uint8_t* source, int64_t rows, int64_t columns, uint8_t* out, int threads) {
    const int64_t panels = (rows + PANEL - 1) / PANEL, size = panel_bytes(format, columns);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t p = 0; p < panels; ++p) pack(format, source, rows, columns, p, p + 1, out + p * size);
}

void herd_matmul(const Matrix* m, const float* x, int64_t rows, float* y, int threads) {
    chosen->matmul(*m, x, rows, y, threads);
}

void herd_forward(const Model* m, const Step* s, int threads) { chosen->forward(*m, *s, threads); }

}
