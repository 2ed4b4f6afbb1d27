/* Eight floats at a time: with AVX2 one register, elsewhere what the compiler makes of it. */
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

/* Eight bfloat16: the upper halves of floats. */
INLINE v8 brain8(const uint16_t *p) {
#if defined(__AVX2__)
    return (v8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
    v8i x;
    for (int i = 0; i < LANES; i++) x[i] = (int32_t)((uint32_t)p[i] << 16);
    return (v8)x;
#endif
}

/* In a fixed order, whatever the number of threads or rows. */
INLINE float sum8(v8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

INLINE float largest8(v8 x) {
    float m = x[0];
    for (int i = 1; i < LANES; i++) m = x[i] > m ? x[i] : m;
    return m;
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

#endif
