// One lane at a time: the kernels in plain C++, for processors without a path of their own and as the others' check.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace herd::HERD_ISA {

inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16;
    const uint32_t exponent = (h >> 10) & 31;
    const uint32_t fraction = h & 1023;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000 | (fraction << 13);
    } else if (exponent) {
        bits = sign | ((exponent + 112) << 23) | (fraction << 13);
    } else {
        const float value = std::ldexp(float(fraction), -24);
        std::memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline uint16_t float_to_half(float x) {
    uint32_t b;
    std::memcpy(&b, &x, 4);
    const uint16_t sign = uint16_t((b >> 16) & 0x8000);
    const float a = std::fabs(x);
    if (!(a < 65520.0f)) return sign | (x != x ? 0x7e00 : 0x7c00);
    if (a < 6.103515625e-05f) return sign | uint16_t(std::nearbyint(a * 16777216.0f));
    std::memcpy(&b, &a, 4);
    b += 0xfff + ((b >> 13) & 1);
    return sign | uint16_t((b >> 13) - (112 << 10));
}

struct V {
    static constexpr int LANES = 1;
    static constexpr bool SIGNED8 = false;
    using F = float;
    using I = uint32_t;
    static F zero() { return 0; }
    static F set(float x) { return x; }
    static F load(const float* p) { return *p; }
    static void store(float* p, F x) { *p = x; }
    static F halves(const uint8_t* p) { uint16_t h; std::memcpy(&h, p, 2); return half_to_float(h); }
    static F brains(const uint16_t* p) { const uint32_t b = uint32_t(*p) << 16; float f; std::memcpy(&f, &b, 4); return f; }
    static F bytes(const uint8_t* p) { return float(*p); }
    static F signed_bytes(const uint8_t* p) { return float(int8_t(*p)); }
    static F fma(F a, F b, F c) { return std::fma(a, b, c); }
    static F fnma(F a, F b, F c) { return std::fma(-a, b, c); }
    static F add(F a, F b) { return a + b; }
    static F mul(F a, F b) { return a * b; }
    static F max(F a, F b) { return a > b ? a : b; }
    static F min(F a, F b) { return a < b ? a : b; }
    static F abs(F a) { return std::fabs(a); }
    static F div(F a, F b) { return a / b; }
    static F sub(F a, F b) { return a - b; }
    static F nearest(F a) { return std::nearbyint(a); }
    static F scale(F a, F n) { return n == n ? std::ldexp(a, int(n)) : n; }
    static void store_halves(uint16_t* p, F x) { *p = float_to_half(x); }
    static void store_brains(uint16_t* p, F x) {
        uint32_t b;
        std::memcpy(&b, &x, 4);
        *p = x != x ? 0x7fc0 : uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);
    }
    static float sum(F a) { return a; }
    static F sums(const F* a) { return *a; }
    static void turn(F*) {}
    static float top(F a) { return a; }
    static F floats(I a) { return float(int32_t(a)); }
    static I ints(int32_t x) { return uint32_t(x); }
    static I words(const uint8_t* p) { uint32_t x; std::memcpy(&x, p, 4); return x; }
    static I both(I a, uint32_t mask) { return a & mask; }
    static I either(I a, I b) { return a | b; }
    template <int N> static I right(I a) { return a >> N; }
    template <int N> static I left(I a) { return a << N; }
    static I plus(I a, I b) { return a + b; }
    static I flip(I a) { return a; }
    static I dot(I acc, I w, int32_t x) {
        for (int i = 0; i < 4; ++i) acc += uint32_t(int32_t((w >> (8 * i)) & 255) * int32_t(int8_t(uint32_t(x) >> (8 * i))));
        return acc;
    }
    static void round8(const float* x, float inverse, int8_t* q) { *q = int8_t(std::lrintf(*x * inverse)); }
};

}  // namespace herd::HERD_ISA
