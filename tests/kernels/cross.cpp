// Products of the instruction set argv[1] beside those of argv[2], for processors that are only emulated here: prints the largest
// difference of each format, relative to the largest result.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>
#include "abi.h"
#include "formats.h"

extern "C" {
int herd_use(const char* name);
int64_t herd_packed_bytes(int format, int64_t rows, int64_t columns);
void herd_pack(int format, const uint8_t* source, int64_t rows, int64_t columns, uint8_t* out, int threads);
int64_t herd_matmul_scratch(const herd::Matrix* m, int64_t rows, int threads);
void herd_matmul(const herd::Matrix* m, const float* x, int64_t rows, float* y, int threads, uint8_t* scratch);
}

static std::mt19937 random_bits(1);

static std::vector<float> product(const char* name, const herd::Matrix& m, const std::vector<float>& x, int64_t rows, int threads) {
    if (!herd_use(name)) std::printf("no %s\n", name), std::exit(2);
    std::vector<float> y(rows * m.rows);
    std::vector<uint8_t> scratch(herd_matmul_scratch(&m, rows, threads) + 64);
    uint8_t* at = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) & ~uintptr_t(63));
    herd_matmul(&m, x.data(), rows, y.data(), threads, at);
    return y;
}

int main(int, char** arguments) {
    const int64_t R = 40;
    for (int format : {herd::F32, herd::F16, herd::BF16, herd::Q4_0, herd::Q8_0, herd::Q4_K, herd::Q5_K, herd::Q6_K}) {
        const herd::Layout l = herd::layout(format);
        const int64_t C = format == herd::Q8_0 ? 352 : 512;  // the last activation scale may be of fewer columns
        std::vector<uint8_t> raw, data;
        if (l.columns) {
            raw.resize(R * C / l.columns * l.block);
            for (uint8_t& byte : raw) byte = uint8_t(random_bits());
            for (size_t at = 0; at < raw.size(); at += l.block) {  // scales of ordinary size: float16 of about 0.01
                const uint16_t scale = 0x2000 | (random_bits() & 0x3ff);
                std::memcpy(&raw[at + (format == herd::Q6_K ? 208 : 0)], &scale, 2);
                if (format == herd::Q4_K || format == herd::Q5_K) std::memcpy(&raw[at + 2], &scale, 2);
            }
            data.resize(herd_packed_bytes(format, R, C));
            herd_pack(format, raw.data(), R, C, data.data(), 1);
        } else {
            data.resize(R * C * (format == herd::F32 ? 4 : 2));
            for (int64_t i = 0; i < R * C; ++i) {
                const float f = float(int(random_bits() % 2001) - 1000) / 1024.0f;
                uint32_t bits;
                std::memcpy(&bits, &f, 4);
                const uint16_t brain = uint16_t(bits >> 16), half = uint16_t(0x3000 | (random_bits() & 0x83ff));
                if (format == herd::F32) std::memcpy(&data[4 * i], &f, 4);
                else std::memcpy(&data[2 * i], format == herd::BF16 ? &brain : &half, 2);
            }
        }
        const herd::Matrix m{data.data(), R, C, format};
        double worst = 0;
        for (int64_t rows : {1, 2, 5, 17, 45}) {
            std::vector<float> x(rows * C);
            for (float& f : x) f = float(int(random_bits() % 2001) - 1000) / 500.0f;
            const std::vector<float> a = product(arguments[2], m, x, rows, 1), b = product(arguments[1], m, x, rows, 1);
            if (b != product(arguments[1], m, x, rows, 3)) return std::puts("threads change bits"), 1;
            double top = 0, off = 0;
            for (size_t i = 0; i < a.size(); ++i) {
                top = std::fmax(top, std::fabs(a[i]));
                off = std::fmax(off, std::isfinite(b[i]) ? std::fabs(double(a[i]) - b[i]) : INFINITY);
            }
            worst = std::fmax(worst, off / top);
        }
        std::printf("%d %g\n", format, worst);
    }
}
