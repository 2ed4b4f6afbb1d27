/* A linear layer over weights packed once, and what becomes of its results. See linear.c. */
#ifndef PAWL_LINEAR_H
#define PAWL_LINEAR_H

#include <stdint.h>

#include "fetch.h"

enum { FLOAT = 0, HALF = 1, BRAIN = 2, BYTE = 3, GROUPS = 4, CODED = 5 }; /* of packed weights */

typedef struct {
    const float *x;      /* [m, k], rows x_stride apart */
    const void *weights; /* panels */
    const float *scales; /* [n], of BYTE; else NULL */
    const float *bias;   /* [n] or NULL */
    float *y;            /* rows y_stride apart */
    int64_t m, k, n, x_stride, y_stride;
    int32_t format;
    int32_t activation; /* of the results, or, gated, of their first half */
    int32_t gated;      /* y [m, n / 2] = activation(first half) * second half; n / 2 is a multiple of 16 */
    int32_t added;      /* y += factor * result instead of y = result */
    float factor;
    int32_t shift; /* of GROUPS: inputs that share a scale, as a binary logarithm */
} Linear;

/* Rows that are multiplied at a time, in registers. */
int64_t linear_tile_rows(void);

/* One thread's share: takes panels from `next` until none are left. wide: linear_wide_bytes of its own. fetch: what is
   fetched meanwhile where there are more rows than those of one tile: memory would be idle. */
void linear_part(const Linear *linear, int64_t *next, int32_t threads, float *wide, Fetch *fetch);
int64_t linear_wide_bytes(int64_t k);

#endif
