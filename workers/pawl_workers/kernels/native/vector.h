/* Eight floats at a time (v8) where lanes are added up: the same bits on every processor with FMA. As many as a register
   holds (vw: 16 with AVX-512, else 8) where each lane is a result of its own, and the width changes no bits. */
#ifndef PAWL_VECTOR_H
#define PAWL_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 8

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));

INLINE v8 load8(const float *p) {
    v8 x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store8(float *p, v8 x) { memcpy(p, &x, sizeof x); }

INLINE v8 all8(float x) { return (v8){x, x, x, x, x, x, x, x}; }

/* a * b + c. Every path of one build rounds alike: once with FMA, twice without. */
INLINE v8 fma8(v8 a, v8 b, v8 c) {
#if defined(__FMA__)
    return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* y = value, or, added, y += factor * value. */
INLINE void put8(float *to, v8 value, int added, float factor) {
    if (added) value = factor == 1.0f ? load8(to) + value : fma8(all8(factor), value, load8(to));
    store8(to, value);
}

INLINE void put(float *to, float value, int added, float factor) {
    if (added) value = factor == 1.0f ? *to + value : fma8(all8(factor), all8(value), all8(*to))[0];
    *to = value;
}

INLINE v8 max8(v8 a, v8 b) {
#if defined(__AVX2__)
    return (v8)_mm256_max_ps((__m256)a, (__m256)b);
#else
    v8 x;
    for (int i = 0; i < LANES; i++) x[i] = a[i] > b[i] ? a[i] : b[i];
    return x;
#endif
}

INLINE v8 min8(v8 a, v8 b) {
#if defined(__AVX2__)
    return (v8)_mm256_min_ps((__m256)a, (__m256)b);
#else
    v8 x;
    for (int i = 0; i < LANES; i++) x[i] = a[i] < b[i] ? a[i] : b[i];
    return x;
#endif
}

/* Eight halves, IEEE binary16; the conversion is exact. */
INLINE v8 half8(const uint16_t *p) {
#if defined(__F16C__)
    return (v8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    v8 x;
    for (int i = 0; i < LANES; i++) {
        uint32_t sign = (uint32_t)(p[i] & 0x8000) << 16, exponent = (p[i] >> 10) & 31, fraction = p[i] & 0x3ff, bits;
        if (exponent == 0) { /* zero or subnormal: fraction * 2^-24 */
            x[i] = (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
            continue;
        }
        bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
        memcpy(&x[i], &bits, sizeof bits);
    }
    return x;
#endif
}

/* In a fixed order, whatever the number of threads or rows. */
INLINE float sum8(v8 x) {
    x += (v8){x[4], x[5], x[6], x[7], x[0], x[1], x[2], x[3]};
    x += (v8){x[2], x[3], x[0], x[1], x[6], x[7], x[4], x[5]};
    return x[0] + x[1];
}

INLINE float largest8(v8 x) {
    x = max8(x, (v8){x[4], x[5], x[6], x[7], x[0], x[1], x[2], x[3]});
    x = max8(x, (v8){x[2], x[3], x[0], x[1], x[6], x[7], x[4], x[5]});
    return x[0] > x[1] ? x[0] : x[1];
}

/* exp(x) for x <= 88, within 2 ulp; 0 below -87.3, so that -infinity weighs nothing.
   Source: Cephes mathematical library, expf (Moshier, 1989). */
INLINE v8 exp8(v8 x) {
    v8i tiny = x < all8(-87.3f);
    x = max8(x, all8(-87.3f));
    v8 magic = all8(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    v8 n = fma8(x, all8(1.44269504088896341f), magic) - magic;
    x = fma8(n, all8(-0.693359375f), x);
    x = fma8(n, all8(2.12194440e-4f), x);
    v8 y = all8(1.9875691500e-4f);
    y = fma8(y, x, all8(1.3981999507e-3f));
    y = fma8(y, x, all8(8.3334519073e-3f));
    y = fma8(y, x, all8(4.1665795894e-2f));
    y = fma8(y, x, all8(1.6666665459e-1f));
    y = fma8(y, x, all8(5.0000001201e-1f));
    y = fma8(y, x * x, x + all8(1.0f));
    v8i power = (__builtin_convertvector(n, v8i) + 127) << 23;
    return (v8)((v8i)(y * (v8)power) & ~tiny);
}

/* tanh(x) within 3 ulp. Source: Cephes mathematical library, tanhf (Moshier, 1989). */
INLINE v8 tanh8(v8 x) {
    v8 size = max8(x, -x), square = x * x;
    v8 small = all8(-5.70498872745e-3f);
    small = fma8(small, square, all8(2.06390887954e-2f));
    small = fma8(small, square, all8(-5.37397155531e-2f));
    small = fma8(small, square, all8(1.33314422036e-1f));
    small = fma8(small, square, all8(-3.33332819422e-1f));
    small = fma8(small * square, x, x);
    v8 large = all8(1.0f) - all8(2.0f) / (exp8(min8(size + size, all8(40.0f))) + all8(1.0f));
    v8i negative = x < all8(0.0f), is_small = size < all8(0.625f);
    large = (v8)((v8i)large ^ (negative & (int32_t)0x80000000));
    return (v8)((is_small & (v8i)small) | (~is_small & (v8i)large));
}

/* erf(x) within 6e-7, as a ratio of polynomials on [-4, 4], outside of which it is 1 or nearly.
   Source: the coefficients of Eigen's erf for floats. */
INLINE v8 erf8(v8 x) {
    x = max8(min8(x, all8(4.0f)), all8(-4.0f));
    v8 square = x * x, p = all8(-2.72614225801306e-10f);
    p = fma8(p, square, all8(2.77068142495902e-8f));
    p = fma8(p, square, all8(-2.10102402082508e-6f));
    p = fma8(p, square, all8(-5.69250639462346e-5f));
    p = fma8(p, square, all8(-7.34990630326855e-4f));
    p = fma8(p, square, all8(-2.95459980854025e-3f));
    p = fma8(p, square, all8(-1.60960333262415e-2f));
    v8 q = all8(-1.45660718464996e-5f);
    q = fma8(q, square, all8(-2.13374055278905e-4f));
    q = fma8(q, square, all8(-1.68282697438203e-3f));
    q = fma8(q, square, all8(-7.37332916720468e-3f));
    q = fma8(q, square, all8(-1.42647390514189e-2f));
    return x * p / q;
}

/* The activations, by the numbers that Python gives them. */
enum { NO_ACTIVATION = 0, SILU = 1, GELU = 2, GELU_TANH = 3, RELU = 4 };

INLINE v8 activate8(int activation, v8 x) {
    switch (activation) {
        /* The clamp keeps the exponential finite where its share is below the last bit. */
        case SILU: return x / (all8(1.0f) + exp8(min8(-x, all8(80.0f))));
        case GELU: return x * all8(0.5f) * (all8(1.0f) + erf8(x * all8(0.70710678118654752f)));
        case GELU_TANH: {
            v8 inner = all8(0.79788456080286536f) * fma8(x * x * x, all8(0.044715f), x);
            return x * all8(0.5f) * (all8(1.0f) + tanh8(inner));
        }
        case RELU: return max8(x, all8(0.0f));
        default: return x;
    }
}

#if defined(__AVX512F__)
#define WIDTH 16
typedef float vw __attribute__((vector_size(64)));

INLINE vw allw(float x) { return (vw)_mm512_set1_ps(x); }
INLINE vw fmaw(vw a, vw b, vw c) { return (vw)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE vw halfw(const uint16_t *p) { return (vw)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vw bytew(const int8_t *p) {
    return (vw)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
/* Two bfloat16 share 32 bits: the one of an even k is the lower half, that of the odd k after it the upper. */
INLINE vw even_brainw(const uint32_t *p) { return (vw)_mm512_slli_epi32(_mm512_loadu_si512(p), 16); }
INLINE vw odd_brainw(const uint32_t *p) {
    return (vw)_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int32_t)0xffff0000));
}
/* exp8 of 16 floats, with the same bits. */
INLINE vw exp16(vw x) {
    __m512 least = _mm512_set1_ps(-87.3f), magic = _mm512_set1_ps(12582912.0f), a = (__m512)x;
    __mmask16 tiny = _mm512_cmp_ps_mask(a, least, _CMP_LT_OQ);
    a = _mm512_max_ps(a, least);
    vw n = fmaw((vw)a, allw(1.44269504088896341f), (vw)magic) - (vw)magic;
    x = fmaw(n, allw(-0.693359375f), (vw)a);
    x = fmaw(n, allw(2.12194440e-4f), x);
    vw y = allw(1.9875691500e-4f);
    y = fmaw(y, x, allw(1.3981999507e-3f));
    y = fmaw(y, x, allw(8.3334519073e-3f));
    y = fmaw(y, x, allw(4.1665795894e-2f));
    y = fmaw(y, x, allw(1.6666665459e-1f));
    y = fmaw(y, x, allw(5.0000001201e-1f));
    y = fmaw(y, x * x, x + allw(1.0f));
    __m512i power = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvttps_epi32((__m512)n), _mm512_set1_epi32(127)), 23);
    return (vw)_mm512_maskz_mul_ps((__mmask16)~tiny, (__m512)y, _mm512_castsi512_ps(power));
}
INLINE vw eachw(vw x, v8 (*function)(int, v8), int argument) {
    v8 low = function(argument, (v8)_mm512_castps512_ps256((__m512)x));
    v8 high = function(argument, (v8)_mm512_extractf32x8_ps((__m512)x, 1));
    return (vw)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)low), (__m256)high, 1);
}
#else
#define WIDTH 8
typedef v8 vw;

INLINE vw allw(float x) { return all8(x); }
INLINE vw fmaw(vw a, vw b, vw c) { return fma8(a, b, c); }
INLINE vw halfw(const uint16_t *p) { return half8(p); }
INLINE vw bytew(const int8_t *p) {
#if defined(__AVX2__)
    return (vw)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    return (vw){p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
#endif
}
INLINE vw even_brainw(const uint32_t *p) {
    v8i x;
    memcpy(&x, p, sizeof x);
    return (vw)(x << 16);
}
INLINE vw odd_brainw(const uint32_t *p) {
    v8i x;
    memcpy(&x, p, sizeof x);
    return (vw)(x & (int32_t)0xffff0000);
}
INLINE vw eachw(vw x, v8 (*function)(int, v8), int argument) { return function(argument, x); }
#endif

static inline v8 activated(int activation, v8 x) { return activate8(activation, x); }

/* activate8 of each float, with the same bits. */
INLINE vw activatew(int activation, vw x) {
#if WIDTH == 16
    if (activation == SILU) return x / (allw(1.0f) + exp16((vw)_mm512_min_ps((__m512)-x, _mm512_set1_ps(80.0f))));
#endif
    return eachw(x, activated, activation);
}

INLINE vw loadw(const float *p) {
    vw x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE void storew(float *p, vw x) { memcpy(p, &x, sizeof x); }

typedef int32_t vwi __attribute__((vector_size(4 * WIDTH)));

INLINE vw maxw(vw a, vw b) {
#if WIDTH == 16
    return (vw)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return max8(a, b);
#endif
}

#if WIDTH == 16
INLINE v8 lower_half(vw x) { return (v8)_mm512_castps512_ps256((__m512)x); }
INLINE v8 upper_half(vw x) { return (v8)_mm512_extractf32x8_ps((__m512)x, 1); }
#endif

INLINE float largestw(vw x) {
#if WIDTH == 16
    return largest8(max8(lower_half(x), upper_half(x)));
#else
    return largest8(x);
#endif
}

#endif
