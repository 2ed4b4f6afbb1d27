/* How rows and weights lie in bytes for a screen, and what their lengths are rounded to. See screen.c. */
#ifndef PAWL_SCREEN_BYTES_H
#define PAWL_SCREEN_BYTES_H

#include <math.h>

#include "panels.h"
#include "vector.h"

#define LARGEST 1e15f /* of what is multiplied: sums of products stay finite */

/* Sums of two products of bytes have to fit 16 bits where a processor adds them up so. */
#if defined(__AVX512VNNI__) || !defined(__AVX2__)
#define MOST_WEIGHT 127
#else
#define MOST_WEIGHT 63
#endif
#define MIDDLE (MOST_WEIGHT + 1)

INLINE int64_t fours_in(int64_t k) { return (k + 3) / 4; }
INLINE int64_t panel_size(int64_t k) { return fours_in(k) * WIDTH * 4; }

/* The least float that is no less. */
INLINE float not_below(double x) {
    float nearest = (float)x;
    return (double)nearest < x ? nextafterf(nearest, INFINITY) : nearest;
}

#endif
