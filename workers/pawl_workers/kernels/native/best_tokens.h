/* What choosing and describing tokens share: peaks, weights, and the best tokens of a row. See best_tokens.c. */
#ifndef PAWL_BEST_TOKENS_H
#define PAWL_BEST_TOKENS_H

#include <stdint.h>

#include "vector.h"

#define BLOCK 64 /* tokens that share a peak, their largest logit, and a sum of weights */

/* Of one thread. */
typedef struct {
    float *row, *peaks, *keys, *weights, *window, *shares;
    int32_t *ids;
    double *sums;
} Scratch;

typedef struct {
    float key;    /* tokens above it are kept */
    int64_t ties; /* and so many equal to it, the first ones */
} Cut;

INLINE int any8(v8i x) {
#if defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
    int any = 0;
    for (int i = 0; i < LANES; i++) any |= x[i];
    return any;
#endif
}

INLINE int64_t size_of_block(int64_t begin, int64_t n) { return n - begin < BLOCK ? n - begin : BLOCK; }

int64_t pawl_sampling_scratch_bytes(int64_t vocabulary);

/* The calling thread's share of the scratch of all. */
Scratch scratch_of(char *memory, int64_t vocabulary);

/* The largest logit of each block, and of all. *finite: whether all are numbers and none infinite. */
float find_peaks(const float *x, int64_t n, float *peaks, int *finite);

/* weights = exp((x - best) * inverse), 0 past the end of the last block, but for blocks without a logit of at least
   `bound`; returns the sum. peaks: NULL for all blocks. */
double weigh(const float *x, int64_t n, const float *peaks, float bound, float best, float inverse, float *weights);

/* Where the tokens, best key first, reach a mass: each is kept while those before it do not. `weights` is NULL for one
   each; else equal keys have equal weights. The range of keys, low to high, is cut into parts, and the part in which the
   mass is reached is cut again, until one key is left; no sort. peaks: NULL, or what blocks without a key of at least
   `low` are passed over by. */
Cut find_cut(const float *keys, const float *weights, int64_t n, const float *peaks, float low, float high, double reach,
             const Scratch *s);

float lowest(const float *keys, int64_t n);

/* The k best tokens into s->ids and s->keys, in order of ids; their number. Among equals the lower ids. */
int64_t take_best(const float *x, int64_t n, const float *peaks, float best, int64_t k, const Scratch *s);

#endif
