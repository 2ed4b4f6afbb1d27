/* The best token of a row without its logits, and yet the one whose logit is the highest: products of bytes bound every
   logit, and only what may be the highest is computed. See screen.c. */
#ifndef PAWL_SCREEN_H
#define PAWL_SCREEN_H

#include <stdint.h>

#include "linear.h"

/* A head once more, in bytes: w[j] is nearly scale[j] * (weights[j] - middle). */
typedef struct {
    const uint8_t *weights; /* [panels][ceil(k / 4)][WIDTH][4] */
    const float *columns;   /* [panels][3][WIDTH]: scales, lengths of w, and of what is left of it, not below the true ones */
    int64_t k, n;
} Screen;

/* A row of x: nearly scale * bytes. */
typedef struct {
    float scale, error, length; /* error: of x, times a column's length; length: of x in bytes, times what is left of w */
    float floor;                /* some logit is no lower */
    int32_t offset;             /* middle times the sum of the bytes */
    int32_t doubtful;           /* not finite, or too large to be bounded */
} ScreenedRow;

/* In one piece of memory: rows, their bytes, and for every two panels what no logit of theirs exceeds. */
typedef struct {
    ScreenedRow *rows;
    int8_t *bytes;   /* [rows][padded] */
    float *ceilings; /* [rows][pairs] */
    int64_t padded, pairs;
} Screened;

Screened screened_of(char *memory, int64_t rows, int64_t k, int64_t n);

/* One thread's shares, each once the one before it is done: rows into bytes, what bounds their logits, and tokens, of the
   linear layer's x and m; chosen [m]: -1 where a logit is not finite. */
void quantise_part(const Screen *screen, const float *x, int64_t rows, const Screened *to, int64_t *next);
void screen_part(const Screen *screen, int64_t rows, const Screened *s, int64_t *next);
void choose_part(const Linear *linear, const Screened *s, int64_t *chosen, int64_t *next, int32_t threads, float *wide);

#endif
