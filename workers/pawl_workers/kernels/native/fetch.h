/* Keys and values on their way into the caches while matrices are multiplied. See fetch.c. */
#ifndef PAWL_FETCH_H
#define PAWL_FETCH_H

#include "attention.h"

/* What one thread fetches for the attention that comes next: the blocks of every so many-th tile of those that it will
   take, by and large. */
typedef struct {
    Attention coming;
    int64_t tile, step, num_tiles; /* that it is at, the way to the next, and how many there still are, this one included */
    int64_t key, left;             /* left: bytes that it may still fetch */
    int values;                      /* the values of the block of `key` are next, not its keys */
    const char *at, *end;            /* of the run that it is at, which lies side by side */
} Fetch;

/* Addresses whose lines are to be fetched one by one: from `at` on, each `step` bytes after the one before. */
typedef struct {
    const char *at;
    int64_t step;
} Lines;

/* A thread's share of what an attention reads; of NULL there is nothing. */
Fetch fetch_for(const Attention *coming, int32_t thread, int32_t threads);

/* What is fetched next, by so many addresses: a line by each, or, where a run ends before, what is left of it in smaller
   steps. Where nothing is left, `none` again and again. */
Lines fetch_some(Fetch *fetch, int64_t addresses, const char *none);

#endif
