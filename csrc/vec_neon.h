// ARMv8.2 with dot products: 4 lanes.
#pragma once
#include <arm_neon.h>
#include <cstdint>
#include <cstring>

namespace herd::HERD_ISA {

struct V {
    static constexpr int LANES = 4;
    static constexpr bool SIGNED8 = true;
    using F = float32x4_t;
    using I = uint32x4_t;
    static F zero() { return vdupq_n_f32(0); }
    static F set(float x) { return vdupq_n_f32(x); }
    static F load(const float* p) { return vld1q_f32(p); }
    static void store(float* p, F x) { vst1q_f32(p, x); }
    static F halves(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
    static F brains(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
    static F bytes(const uint8_t* p) {
        uint32_t x;
        std::memcpy(&x, p, 4);
        return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(x)))));
    }
    static F signed_bytes(const uint8_t* p) {
        uint32_t x;
        std::memcpy(&x, p, 4);
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(x)))));
    }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F sub(F a, F b) { return vsubq_f32(a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F div(F a, F b) { return vdivq_f32(a, b); }
    static F max(F a, F b) { return vmaxq_f32(a, b); }
    static F min(F a, F b) { return vminq_f32(a, b); }
    static F abs(F a) { return vabsq_f32(a); }
    static F nearest(F a) { return vrndnq_f32(a); }
    static F scale(F a, F n) {  // n from -126 to 127
        return vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23)));
    }
    static float sum(F a) { return vaddvq_f32(a); }
    static F sums(const F* a) { return vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])); }  // lane i: the sum of a[i]
    static void turn(F* a) {  // rows become columns
        const float32x4x2_t p = vtrnq_f32(a[0], a[1]), q = vtrnq_f32(a[2], a[3]);
        a[0] = vcombine_f32(vget_low_f32(p.val[0]), vget_low_f32(q.val[0]));
        a[1] = vcombine_f32(vget_low_f32(p.val[1]), vget_low_f32(q.val[1]));
        a[2] = vcombine_f32(vget_high_f32(p.val[0]), vget_high_f32(q.val[0]));
        a[3] = vcombine_f32(vget_high_f32(p.val[1]), vget_high_f32(q.val[1]));
    }
    static float top(F a) { return vmaxvq_f32(a); }
    static void store_halves(uint16_t* p, F x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
    static void store_brains(uint16_t* p, F x) {
        const I b = vreinterpretq_u32_f32(x);
        const I odd = vandq_u32(vshrq_n_u32(b, 16), vdupq_n_u32(1));
        const I up = vshrq_n_u32(vaddq_u32(b, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
        vst1_u16(p, vmovn_u32(vbslq_u32(vceqq_f32(x, x), up, vdupq_n_u32(0x7fc0))));
    }
    static F floats(I a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
    static I ints(int32_t x) { return vreinterpretq_u32_s32(vdupq_n_s32(x)); }
    static I words(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
    static I both(I a, uint32_t mask) { return vandq_u32(a, vdupq_n_u32(mask)); }
    static I either(I a, I b) { return vorrq_u32(a, b); }
    template <int N> static I right(I a) { if constexpr (N == 0) return a; else return vshrq_n_u32(a, N); }
    template <int N> static I left(I a) { return vshlq_n_u32(a, N); }
    static I plus(I a, I b) { return vaddq_u32(a, b); }
    static I flip(I a) { return veorq_u32(a, vdupq_n_u32(0x80808080)); }
    static I dot(I acc, I w, int32_t x) {
        return vreinterpretq_u32_s32(vdotq_s32(vreinterpretq_s32_u32(acc), vreinterpretq_s8_u32(w), vreinterpretq_s8_s32(vdupq_n_s32(x))));
    }
    static void round8(const float* x, float inverse, int8_t* q) {
        const int32x4_t n = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x), inverse));
        const int16x4_t w = vqmovn_s32(n);
        vst1_lane_u32(reinterpret_cast<uint32_t*>(q), vreinterpret_u32_s8(vqmovn_s16(vcombine_s16(w, w))), 0);
    }
};

inline float half_to_float(uint16_t h) {
    float16_t x;
    std::memcpy(&x, &h, 2);
    return x;
}

}  // namespace herd::HERD_ISA
