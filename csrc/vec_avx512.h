// AVX-512 with VNNI: 16 lanes; with BF16 also products of bfloat16.
#pragma once
#include <immintrin.h>
#include <cstdint>

namespace herd::HERD_ISA {

struct V {
    static constexpr int LANES = 16;
    static constexpr bool SIGNED8 = false;
    using F = __m512;
    using I = __m512i;
    static F zero() { return _mm512_setzero_ps(); }
    static F set(float x) { return _mm512_set1_ps(x); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static F halves(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static F brains(const uint16_t* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
    }
    static F bytes(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
    static F signed_bytes(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F nearest(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F scale(F a, F n) { return _mm512_scalef_ps(a, n); }
    static void store_halves(uint16_t* p, F x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static void store_brains(uint16_t* p, F x) {
        const __m512i b = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
        __m512i up = _mm512_srli_epi32(_mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(up));
    }
    static float sum(F a) { return _mm512_reduce_add_ps(a); }
    static F pair(F a, F b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
    static F quad(F a, F b) {
        const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
        return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    static F fold(F a, F b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); }
    static F sums(const F* a) {  // lane i: the sum of a[i]
        F u[4];
        for (int i = 0; i < 4; ++i) u[i] = quad(pair(a[4 * i], a[4 * i + 1]), pair(a[4 * i + 2], a[4 * i + 3]));
        return fold(fold(u[0], u[1]), fold(u[2], u[3]));
    }
    static void turn(F* a) {  // rows become columns
        F u[16];
        for (int i = 0; i < 16; i += 4) {
            const __m512d p = _mm512_castps_pd(_mm512_unpacklo_ps(a[i], a[i + 1])), q = _mm512_castps_pd(_mm512_unpackhi_ps(a[i], a[i + 1]));
            const __m512d r = _mm512_castps_pd(_mm512_unpacklo_ps(a[i + 2], a[i + 3])), s = _mm512_castps_pd(_mm512_unpackhi_ps(a[i + 2], a[i + 3]));
            u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, r));
            u[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, r));
            u[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(q, s));
            u[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(q, s));
        }
        for (int i = 0; i < 4; ++i) {
            const F p = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88), q = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xdd);
            const F r = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88), s = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xdd);
            a[i] = _mm512_shuffle_f32x4(p, r, 0x88);
            a[4 + i] = _mm512_shuffle_f32x4(q, s, 0x88);
            a[8 + i] = _mm512_shuffle_f32x4(p, r, 0xdd);
            a[12 + i] = _mm512_shuffle_f32x4(q, s, 0xdd);
        }
    }
    static float top(F a) { return _mm512_reduce_max_ps(a); }
    static F floats(I a) { return _mm512_cvtepi32_ps(a); }
    static I ints(int32_t x) { return _mm512_set1_epi32(x); }
    static I words(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static void store_words(uint8_t* p, I a) { _mm512_storeu_si512(p, a); }
    static I both(I a, uint32_t mask) { return _mm512_and_si512(a, _mm512_set1_epi32(int32_t(mask))); }
    static I either(I a, I b) { return _mm512_or_si512(a, b); }
    template <int N> static I right(I a) { return _mm512_srli_epi32(a, N); }
    template <int N> static I left(I a) { return _mm512_slli_epi32(a, N); }
    static I plus(I a, I b) { return _mm512_add_epi32(a, b); }
    static I flip(I a) { return a; }
    static I dot(I acc, I w, int32_t x) { return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x)); }
#ifdef HERD_BRAINS
    using B = __m512bh;
    static B pairs(const uint8_t* p) { return B(_mm512_loadu_si512(p)); }
    static F dot_pairs(F acc, B a, B b) { return _mm512_dpbf16_ps(acc, a, b); }
#endif
    static void round8(const float* x, float inverse, int8_t* q) {
        const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(inverse)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtsepi32_epi8(n));
    }
};

inline float half_to_float(uint16_t h) { return _cvtsh_ss(h); }

}  // namespace herd::HERD_ISA
