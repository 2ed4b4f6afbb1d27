/* A routed layer: each token goes through a few of many MLPs, whose rows are computed together, and what one more found
   for every token may be added. See experts.c. */
#ifndef PAWL_EXPERTS_H
#define PAWL_EXPERTS_H

#include "linear.h"

typedef struct {
    const Linear *up, *down; /* of each expert, without rows, input and output */
    int64_t num_experts, num_active; /* in all, and of a token */
    int64_t width, inner; /* floats of the stream, and between up and down */
    int32_t added; /* y += factor * result instead of y = result */
    int32_t shared; /* one more expert has found something for every token */
    float factor;
} Experts;

/* Of one step. A row is a token at one of its experts: rows of the same expert lie side by side. */
typedef struct {
    const int64_t *chosen; /* [tokens, num_active]: experts of each token */
    const float *shares;   /* [tokens, num_active]: of its result */
    char *memory;          /* routing_bytes of them */
    float *x, *gathered; /* [tokens, width], [rows, width] */
    float *hidden;       /* [rows, inner] */
    float *found, *y;    /* [rows, width], [tokens, width] */
    const float *shared, *shared_shares; /* [tokens, width], [tokens]: results of the shared expert and its shares */
    int64_t tokens;
} Routing;

int64_t routing_bytes(int64_t tokens, int64_t num_experts, int64_t num_active);

/* Called in this order, by all threads, each once the one before it is done; `group_rows` does its work in one of them. */
void group_rows(const Experts *experts, const Routing *routing, int64_t *next);
void gather_part(const Experts *experts, const Routing *routing, int64_t *next);
void up_part(const Experts *experts, const Routing *routing, int32_t threads, float *wide);
void down_part(const Experts *experts, const Routing *routing, int32_t threads, float *wide);
void combine_part(const Experts *experts, const Routing *routing, int64_t *next);

#endif
