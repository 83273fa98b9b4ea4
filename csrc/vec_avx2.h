// AVX2, FMA and F16C: 8 lanes. Products of bytes go through 16-bit pairs, which hold |127 * 128 * 2|: numbers up to 127 are
// taken as they are, 8-bit ones are made signed first (SIGNED8), and the sign moves to the activation.
#pragma once
#include <immintrin.h>
#include <cstdint>

namespace herd::HERD_ISA {

struct V {
    static constexpr int LANES = 8;
    static constexpr bool SIGNED8 = true;
    using F = __m256;
    using I = __m256i;
    static F zero() { return _mm256_setzero_ps(); }
    static F set(float x) { return _mm256_set1_ps(x); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    static F halves(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static F brains(const uint16_t* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
    }
    static F bytes(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))); }
    static F signed_bytes(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    static F nearest(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F scale(F a, F n) {  // n from -126 to 127
        return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)));
    }
    static float sum(F a) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
    static F pair(F a, F b) { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); }
    static F quad(F a, F b) {
        const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
        return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
    }
    static F sums(const F* a) {  // lane i: the sum of a[i]
        const F u = quad(pair(a[0], a[1]), pair(a[2], a[3])), v = quad(pair(a[4], a[5]), pair(a[6], a[7]));
        return _mm256_add_ps(_mm256_permute2f128_ps(u, v, 0x20), _mm256_permute2f128_ps(u, v, 0x31));
    }
    static void turn(F* a) {  // rows become columns
        F u[8];
        for (int i = 0; i < 8; i += 4) {
            const __m256d p = _mm256_castps_pd(_mm256_unpacklo_ps(a[i], a[i + 1])), q = _mm256_castps_pd(_mm256_unpackhi_ps(a[i], a[i + 1]));
            const __m256d r = _mm256_castps_pd(_mm256_unpacklo_ps(a[i + 2], a[i + 3])), s = _mm256_castps_pd(_mm256_unpackhi_ps(a[i + 2], a[i + 3]));
            u[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(p, r));
            u[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(p, r));
            u[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(q, s));
            u[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(q, s));
        }
        for (int i = 0; i < 4; ++i) {
            a[i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
            a[4 + i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
        }
    }
    static float top(F a) {
        __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        s = _mm_max_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
    }
    static void store_halves(uint16_t* p, F x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static void store_brains(uint16_t* p, F x) {
        const __m256i b = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
        __m256i up = _mm256_srli_epi32(_mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
        up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(up, up), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    }
    static F floats(I a) { return _mm256_cvtepi32_ps(a); }
    static I ints(int32_t x) { return _mm256_set1_epi32(x); }
    static I words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static I both(I a, uint32_t mask) { return _mm256_and_si256(a, _mm256_set1_epi32(int32_t(mask))); }
    static I either(I a, I b) { return _mm256_or_si256(a, b); }
    template <int N> static I right(I a) { return _mm256_srli_epi32(a, N); }
    template <int N> static I left(I a) { return _mm256_slli_epi32(a, N); }
    static I plus(I a, I b) { return _mm256_add_epi32(a, b); }
    static I flip(I a) { return _mm256_xor_si256(a, _mm256_set1_epi8(char(0x80))); }
    static I dot(I acc, I w, int32_t x) {
        const I pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(_mm256_set1_epi32(x), w));
        return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static void round8(const float* x, float inverse, int8_t* q) {
        const __m256i n = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(inverse)));
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(q), _mm_packs_epi16(words, words));
    }
};

inline float half_to_float(uint16_t h) { return _cvtsh_ss(h); }

}  // namespace herd::HERD_ISA
