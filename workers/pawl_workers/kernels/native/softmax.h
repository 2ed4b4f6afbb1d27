/* Scores become weights, and the results of two parts of the keys one.

   Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018. */
#ifndef PAWL_SOFTMAX_H
#define PAWL_SOFTMAX_H

#include "vector.h"

#define STEP 16 /* scores at a time, whatever the width of a register: sums of weights have the same bits */

/* e^x for x <= 0, exactly 1 at 0; 0 below -87.7, so that -infinity weighs nothing. It is 2^(x log2 e): what rounding that
   product loses grows with x, as the result falls. The polynomial for 2^f has the least relative error, 1e-7, of those of
   its degree on [-1/2, 1/2] that are 1 at 0. */
INLINE vw expw(vw x) {
    vw magic = allw(12583039.0f); /* 1.5 * 2^23 + 127: adding it rounds to an integer, the exponent's bits lowest */
    x = maxw(allw(-127.0f), x * allw(1.44269504088896341f)); /* in this order: what is no number stays none */
    vw rounded = x + magic, f = x - (rounded - magic), y = allw(1.3264727253e-3f);
    y = fmaw(y, f, allw(9.6715127859e-3f));
    y = fmaw(y, f, allw(5.5507337445e-2f));
    y = fmaw(y, f, allw(2.4022242083e-1f));
    y = fmaw(y, f, allw(6.9314697760e-1f));
    y = fmaw(y, f, allw(1.0f));
    return y * (vw)((vwi)rounded << 23);
}

/* scores[from .. to) of keys that are not in [past, seen) become -infinity; from and to are multiples of STEP. */
INLINE void hide(float *scores, int64_t from, int64_t to, int64_t past, int64_t seen) {
    for (int64_t i = from; i < past && i < to; i++) scores[i] = -INFINITY;
    vwi lane;
    for (int i = 0; i < WIDTH; i++) lane[i] = i;
    for (int64_t i = seen < from ? from : seen / WIDTH * WIDTH; i < to; i += WIDTH) {
        vwi shown = lane < (int32_t)(seen - i);
        storew(scores + i, (vw)((shown & (vwi)loadw(scores + i)) | (~shown & (vwi)allw(-INFINITY))));
    }
}

INLINE float sum_of(vw first, vw second) {
#if WIDTH == 16
    (void)second;
    return sum8(lower_half(first) + upper_half(first));
#else
    return sum8(first + second);
#endif
}

/* Of some rows, `stride` apart, scores[from .. to), both multiples of STEP, become weights: their sums, and the scores
   that weigh 1. `scales`: of values, in blocks of so many, which go into the weights after these are added up; or NULL. */
INLINE void weigh_rows(int rows, float *scores, int64_t stride, int64_t from, int64_t to, const float *const *scales,
                       int64_t block, float *maximum, float *total) {
    vw most[4], first[4], second[4];
    float one[4];
    for (int r = 0; r < rows; r++) most[r] = loadw(scores + r * stride + from), first[r] = second[r] = allw(0.0f);
    for (int64_t i = from + WIDTH; i < to; i += WIDTH)
        for (int r = 0; r < rows; r++) most[r] = maxw(most[r], loadw(scores + r * stride + i));
    for (int r = 0; r < rows; r++) {
        maximum[r] = largestw(most[r]);
        one[r] = maximum[r] == -INFINITY ? 0.0f : maximum[r]; /* of a row that sees none of these keys all weigh 0 */
    }
    for (int64_t i = from; i < to; i += STEP)
        for (int half = 0; half < STEP / WIDTH; half++) {
            int64_t at = i + half * WIDTH;
            vw scale = scales ? loadw(scales[i / block] + i % block + half * WIDTH) : allw(1.0f);
            for (int r = 0; r < rows; r++) {
                vw weight = expw(loadw(scores + r * stride + at) - allw(one[r]));
                if (half) second[r] += weight;
                else first[r] += weight;
                storew(scores + r * stride + at, scales ? weight * scale : weight);
            }
        }
    for (int r = 0; r < rows; r++) total[r] = sum_of(first[r], second[r]);
}

/* total, maximum and sums become those of both parts. */
INLINE void merge(float *maximum, float *total, float *sums, float other_maximum, float other_total, const float *other,
                  int64_t dims) {
    if (other_maximum == -INFINITY) return; /* nothing seen there */
    if (*maximum == -INFINITY) {
        for (int64_t i = 0; i < dims; i += WIDTH) storew(sums + i, loadw(other + i));
        *maximum = other_maximum, *total = other_total;
        return;
    }
    float both = *maximum > other_maximum ? *maximum : other_maximum;
    vw kept = expw(allw(*maximum - both)), added = expw(allw(other_maximum - both));
    for (int64_t i = 0; i < dims; i += WIDTH)
        storew(sums + i, fmaw(loadw(other + i), added, loadw(sums + i) * kept));
    *total = *total * kept[0] + other_total * added[0];
    *maximum = both;
}

#endif
