/* What lies between the products: vectors of tokens, norms, rotation and the writing of keys and values. See elementwise.c. */
#ifndef PAWL_ELEMENTWISE_H
#define PAWL_ELEMENTWISE_H

#include <stdint.h>

enum { RMS_NORM = 0, LAYER_NORM = 1 };

typedef struct {
    const void *vectors;    /* [vocabulary, n], FLOAT, HALF or BRAIN of linear.h */
    const float *positions; /* [longest, n], or NULL */
    int64_t n;
    int32_t format;
    float scale;
} Embedding;

typedef struct {
    const float *x;            /* [rows, n] */
    const float *weight, *bias; /* [n]; bias of layer norms, or NULL */
    float *y;                  /* [rows, n]; added: y += factor * norm(x) */
    int64_t rows, n;
    int32_t kind, added;
    float epsilon, factor;
} Norm;

typedef struct {
    float *heads;                          /* [rows, H + 2K, head_dim], changed in place */
    const float *cosines, *sines;          /* [rows, turned], sines negative in their first half; or NULL */
    const float *query_norm, *key_norm;    /* [head_dim], or of all heads when `wide`; NULL: none */
    float *q;                              /* [rows, H, head_dim] */
    char *keys, *values;                   /* the cache, as in attention.c */
    const int64_t *slots;                  /* block * 32 + offset, [rows] */
    int64_t rows, heads_of_queries, kv_heads, head_dim, turned, padded;
    int32_t wide, format;
    float epsilon;
} Place;

/* One thread's share, taken in chunks of rows from `next`. */
void embed_part(const Embedding *embedding, const int64_t *token_ids, const int64_t *positions, float *x, int64_t rows,
                int64_t *next, int32_t threads);
void norm_part(const Norm *norm, int64_t *next, int32_t threads);
void place_part(const Place *place, int64_t *next, int32_t threads);

#endif
