/* Keys and values on their way into the caches while matrices are multiplied.

   Products of many rows wait for the processor, and memory is idle; attention of decodes waits for memory, and the
   processor is idle. So what the next attention will read is fetched along with the products before it, a line at a time,
   into the second-level cache, from which it goes on to the third. Results do not change.

   Prompts compute more with what they read, and are left out. */
#include "fetch.h"

#include <stddef.h>

#include "ends.h"

#define MOST_TOKENS 4       /* of a tile whose keys and values are fetched */
#define MOST_BYTES (4 << 20) /* of a thread: its share of the third-level cache holds them until they are read */

Fetch fetch_for(const Attention *coming, int32_t thread, int32_t threads) {
    if (!coming) return (Fetch){.left = 0};
    int last = from_the_last(thread);
    int64_t odd = threads / 2, odd_tiles = coming->num_tiles * odd / threads;
    int64_t beside = thread / 2, step = last ? odd : threads - odd; /* threads before it at its end, and all of them */
    int64_t tiles = last ? odd_tiles : coming->num_tiles - odd_tiles;
    return (Fetch){.coming = *coming,
                   .tile = last ? coming->num_tiles - 1 - beside : beside,
                   .step = last ? -step : step,
                   .num_tiles = (tiles - beside + step - 1) / step,
                   .key = -1,
                   .left = MOST_BYTES};
}

/* The next tile of decodes, from this one on; its heads share blocks with those of the tile that begins with head 0. */
static const int64_t *tile_of(Fetch *f) {
    for (; f->num_tiles > 0; f->num_tiles--, f->tile += f->step, f->key = -1) {
        const int64_t *tile = f->coming.tiles + f->tile * TILE_FIELDS;
        if (tile[TOKENS] > MOST_TOKENS || tile[FIRST_HEAD] != 0) continue;
        if (f->key < 0) f->key = larger(tile[FIRST_POSITION] + 1 - f->coming.window, 0) / BLOCK * BLOCK;
        if (f->key < tile[FIRST_POSITION] + tile[TOKENS]) return tile;
    }
    return NULL;
}

/* All heads of a block lie side by side. */
static int next_run(Fetch *f) {
    const int64_t *tile = tile_of(f);
    if (!tile) return 0;
    const Attention *a = &f->coming;
    int64_t run = a->kv_heads * cache_bytes(a->format, a->padded);
    int64_t block = a->tables[tile[SEQUENCE] * a->table_stride + f->key / BLOCK];
    f->at = (f->values ? a->values : a->keys) + block * run;
    f->end = f->at + run;
    if (f->values) f->key += BLOCK;
    f->values = !f->values;
    return 1;
}

Lines fetch_some(Fetch *f, int64_t addresses, const char *none) {
    if (f->left <= 0 || (f->at >= f->end && !next_run(f))) {
        f->left = 0;
        return (Lines){none, 0};
    }
    int64_t bytes = smaller(f->end - f->at, addresses * LINE);
    Lines some = {f->at, (bytes + addresses - 1) / addresses};
    f->at += bytes;
    f->left -= bytes;
    return some;
}
