/* A routed layer: tokens sorted by expert, the MLP of each expert over its rows, and each token's results added up.

   A token adds up its experts in the order of their numbers, then the shared one, each result times its share, both
   rounded: its bits depend neither on which tokens share its experts nor on the number of threads.

   Source: Shazeer et al., "Outrageously large neural networks", 2017; grouped by expert as in Gale et al.,
   "MegaBlocks", 2022. */
#include "experts.h"

#include <string.h>

#include "vector.h"

/* How the memory of a routing is divided. */
typedef struct {
    int64_t *first;            /* [num_experts + 1]: the first row of each expert */
    int64_t *up_next, *down_next; /* [num_experts]: panels of its linear layers that threads have taken */
    int64_t *token;            /* [rows] */
    int64_t *place;            /* [tokens, num_active]: rows of a token, in the order of its experts' numbers */
    float *share;              /* [rows] */
} Tables;

int64_t routing_bytes(int64_t tokens, int64_t num_experts, int64_t num_active) {
    return (3 * num_experts + 1 + 2 * tokens * num_active) * (int64_t)sizeof(int64_t) +
           tokens * num_active * (int64_t)sizeof(float);
}

INLINE Tables tables_of(const Experts *e, const Routing *r) {
    int64_t *first = (int64_t *)r->memory, *up = first + e->num_experts + 1, *down = up + e->num_experts;
    int64_t *token = down + e->num_experts, *place = token + r->tokens * e->num_active;
    return (Tables){first, up, down, token, place, (float *)(place + r->tokens * e->num_active)};
}

void group_rows(const Experts *e, const Routing *r, int64_t *next) {
    if (__atomic_fetch_add(next, 1, __ATOMIC_RELAXED) != 0) return;
    Tables t = tables_of(e, r);
    int64_t rows = r->tokens * e->num_active;
    memset(t.first, 0, (size_t)(3 * e->num_experts + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < rows; i++) t.first[r->chosen[i] + 1]++;
    for (int64_t i = 0; i < e->num_experts; i++) t.first[i + 1] += t.first[i];
    /* `up_next` counts each expert's rows while they are dealt out, and is set back. */
    for (int64_t token = 0; token < r->tokens; token++) {
        int64_t *place = t.place + token * e->num_active;
        for (int64_t i = 0; i < e->num_active; i++) {
            int64_t expert = r->chosen[token * e->num_active + i], row = t.first[expert] + t.up_next[expert]++, at = i;
            t.token[row] = token;
            t.share[row] = r->shares[token * e->num_active + i];
            for (; at > 0 && place[at - 1] > row; at--) place[at] = place[at - 1];
            place[at] = row;
        }
    }
    memset(t.up_next, 0, (size_t)e->num_experts * sizeof(int64_t));
}

void gather_part(const Experts *e, const Routing *r, int64_t *next) {
    Tables t = tables_of(e, r);
    int64_t rows = r->tokens * e->num_active;
    for (int64_t row; (row = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < rows;)
        memcpy(r->gathered + row * e->width, r->x + t.token[row] * e->width, (size_t)e->width * sizeof(float));
}

/* Every thread meets the experts in the same order and takes what panels are left of each. */
static void all_experts(const Experts *e, const Tables *t, const Linear *linears, const float *x, int64_t x_width,
                        float *y, int64_t y_width, int64_t *next, int32_t threads, float *wide) {
    Fetch nothing = fetch_for(NULL, 0, threads);
    for (int64_t i = 0; i < e->num_experts; i++) {
        int64_t first = t->first[i], rows = t->first[i + 1] - first;
        if (rows == 0) continue;
        Linear linear = linears[i];
        linear.x = x + first * x_width, linear.y = y + first * y_width, linear.m = rows;
        linear_part(&linear, next + i, threads, wide, &nothing);
    }
}

void up_part(const Experts *e, const Routing *r, int32_t threads, float *wide) {
    Tables t = tables_of(e, r);
    all_experts(e, &t, e->up, r->gathered, e->width, r->hidden, e->inner, t.up_next, threads, wide);
}

void down_part(const Experts *e, const Routing *r, int32_t threads, float *wide) {
    Tables t = tables_of(e, r);
    all_experts(e, &t, e->down, r->hidden, e->inner, r->found, e->width, t.down_next, threads, wide);
}

INLINE float added_up(const Experts *e, const Routing *r, const Tables *t, int64_t token, int64_t i) {
    const int64_t *place = t->place + token * e->num_active;
    float sum = 0.0f;
    for (int64_t k = 0; k < e->num_active; k++) sum += r->found[place[k] * e->width + i] * t->share[place[k]];
    if (e->shared) sum += r->shared[token * e->width + i] * r->shared_shares[token];
    return sum;
}

INLINE v8 added_up8(const Experts *e, const Routing *r, const Tables *t, int64_t token, int64_t i) {
    const int64_t *place = t->place + token * e->num_active;
    v8 sum = all8(0.0f);
    for (int64_t k = 0; k < e->num_active; k++)
        sum += load8(r->found + place[k] * e->width + i) * all8(t->share[place[k]]);
    if (e->shared) sum += load8(r->shared + token * e->width + i) * all8(r->shared_shares[token]);
    return sum;
}

void combine_part(const Experts *e, const Routing *r, int64_t *next) {
    Tables t = tables_of(e, r);
    for (int64_t token; (token = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < r->tokens;) {
        float *y = r->y + token * e->width;
        int64_t i = 0;
        for (; i + LANES <= e->width; i += LANES) put8(y + i, added_up8(e, r, &t, token, i), e->added, e->factor);
        for (; i < e->width; i++) put(y + i, added_up(e, r, &t, token, i), e->added, e->factor);
    }
}
