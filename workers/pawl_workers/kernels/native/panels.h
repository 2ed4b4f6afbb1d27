/* Where the packed panels of a linear layer lie, and how threads share them out. */
#ifndef PAWL_PANELS_H
#define PAWL_PANELS_H

#include "ends.h"
#include "linear.h"
#include "vector.h"

typedef struct {
    const Linear *linear;
    int64_t odd_step, pair_step; /* bytes from an even panel to the odd one after it, and from pair to pair */
} Panels;

INLINE int64_t panel_bytes(int format, int64_t k) {
    if (format == CODED) return k * WIDTH * 3 / 2;
    return format == BRAIN ? (k + 1) / 2 * WIDTH * 4 : k * WIDTH * (format == FLOAT ? 4 : format == HALF ? 2 : 1);
}

/* Bytes of a panel's scales that lie among its weights. */
INLINE int64_t scale_bytes(int shift, int64_t k) { return ((k + (1 << shift) - 1) >> shift) * WIDTH * 4; }

INLINE Panels panels_of(const Linear *l, int64_t bytes) {
    int64_t half = (l->n / 2 / WIDTH) * bytes; /* gated: from the panel of gates to that of their factors */
    return (Panels){l, l->gated ? half : bytes, l->gated ? bytes : 2 * bytes};
}

INLINE int64_t panels_in(int64_t n) { return (n + 2 * WIDTH - 1) / (2 * WIDTH) * 2; }

#define CHUNK 4 /* panels, or a multiple of so many */

/* Panels that a thread takes; none where `first` is `end`. */
typedef struct {
    int64_t first, end;
} Share;

/* The next panels of a thread, fewer the fewer are left, so that threads end together. Threads of even numbers come from
   the first panel on, those of odd ones from the last one back, so that each of two goes on where it was and knows what
   it reads next. taken: panels from both ends, in its lower and its upper half. */
INLINE Share take_panels(int64_t *taken, int64_t panels, int32_t threads, int odd) {
    int64_t before = __atomic_load_n(taken, __ATOMIC_RELAXED), front, back, left, size;
    do {
        front = before & 0xffffffff, back = before >> 32, left = panels - front - back;
        if (left <= 0) return (Share){0, 0};
        size = left / (threads * 4) / CHUNK * CHUNK;
        if (size < CHUNK) size = left > 2 * threads ? CHUNK : 2;
        if (threads == 1 || size > left) size = left;
    } while (!__atomic_compare_exchange_n(taken, &before, before + (odd ? size << 32 : size), 1, __ATOMIC_RELAXED,
                                          __ATOMIC_RELAXED));
    int64_t first = odd ? panels - back - size : front;
    return (Share){first, first + size};
}

/* How a layer's panels are dealt out: so many chunks, and at the end small ones, so that threads end together. */
typedef struct {
    int64_t panels, chunk, chunks, small, items;
} Deal;

INLINE Deal deal_panels(int64_t n, int32_t threads) {
    int64_t panels = panels_in(n);
    int64_t chunk = panels / (threads * 6) / CHUNK * CHUNK;
    if (threads == 1) return (Deal){panels, panels, 1, panels, 1};
    if (chunk < CHUNK) chunk = CHUNK;
    int64_t small = chunk == CHUNK ? 2 : CHUNK;
    int64_t chunks = panels > 2 * threads ? (panels - 2 * threads) / chunk : 0;
    return (Deal){panels, chunk, chunks, small, chunks + (panels - chunks * chunk + small - 1) / small};
}

/* The first panel of an item. */
INLINE int64_t first_of(const Deal *d, int64_t item) {
    return item < d->chunks ? item * d->chunk : d->chunks * d->chunk + (item - d->chunks) * d->small;
}

/* The panel after its last one. */
INLINE int64_t end_of(const Deal *d, int64_t item) {
    int64_t end = first_of(d, item) + (item < d->chunks ? d->chunk : d->small);
    return end < d->panels ? end : d->panels;
}

/* How many rows are dealt out: the first half of them from the first item on, the other from the last one back, so that a
   thread mostly reads rows that it wrote itself, which is faster where caches are not shared. In each half it is chunks of
   panels with all its rows, and then, so that threads end together, pairs of panels with one block of rows each. */
typedef struct {
    int64_t rows, panels, chunks, items;
    int64_t tiles, block; /* rows in tiles of nearly equal height, and how many of them are a block */
} Halves;

#define SHARED_PANELS 12 /* of a half, at least, where it has so many */

/* Some panels times some rows. */
typedef struct {
    int64_t first, end, row, row_end;
} Part;

INLINE int64_t blocks_in(const Halves *h, int64_t tiles) { return (tiles + h->block - 1) / h->block; }

INLINE int64_t items_in(const Halves *h, int64_t tiles) {
    return h->chunks + (h->panels - h->chunks * CHUNK) / 2 * blocks_in(h, tiles);
}

/* height, block: rows of a tile and of a block, the most of them. */
INLINE Halves halve(int64_t rows, int64_t n, int64_t height, int64_t block) {
    Halves h = {.rows = rows, .panels = panels_in(n), .tiles = (rows + height - 1) / height, .block = block / height};
    h.chunks = larger(h.panels - SHARED_PANELS, 0) / CHUNK;
    h.items = items_in(&h, h.tiles / 2) + items_in(&h, h.tiles - h.tiles / 2);
    return h;
}

INLINE Part part_of(const Halves *h, int64_t item) {
    int second = item >= items_in(h, h->tiles / 2);
    int64_t number = second ? h->items - 1 - item : item, rest = number - h->chunks;
    int64_t tile = second ? h->tiles / 2 : 0, tiles = second ? h->tiles - tile : h->tiles / 2;
    int64_t blocks = rest < 0 ? 1 : blocks_in(h, tiles), block = rest < 0 ? 0 : rest % blocks;
    int64_t first = rest < 0 ? number * CHUNK : h->chunks * CHUNK + rest / blocks * 2;
    return (Part){first, first + (rest < 0 ? CHUNK : 2), (tile + tiles * block / blocks) * h->rows / h->tiles,
                  (tile + tiles * (block + 1) / blocks) * h->rows / h->tiles};
}

#endif
