/* Where the packed panels of a linear layer lie, and how threads share them out. */
#ifndef PAWL_PANELS_H
#define PAWL_PANELS_H

#include "linear.h"
#include "vector.h"

typedef struct {
    const Linear *linear;
    int64_t odd_step, pair_step; /* bytes from an even panel to the odd one after it, and from pair to pair */
} Panels;

INLINE int64_t panel_bytes(int format, int64_t k) {
    return format == BRAIN ? (k + 1) / 2 * WIDTH * 4 : k * WIDTH * (format == FLOAT ? 4 : format == HALF ? 2 : 1);
}

/* Bytes of a panel's scales that lie among its weights. */
INLINE int64_t scale_bytes(int shift, int64_t k) { return ((k + (1 << shift) - 1) >> shift) * WIDTH * 4; }

INLINE Panels panels_of(const Linear *l, int64_t bytes) {
    int64_t half = (l->n / 2 / WIDTH) * bytes; /* gated: from the panel of gates to that of their factors */
    return (Panels){l, l->gated ? half : bytes, l->gated ? bytes : 2 * bytes};
}

#define CHUNK 4 /* panels, or a multiple of so many */

/* How a layer's panels are dealt out: so many chunks, and at the end small ones, so that threads end together. */
typedef struct {
    int64_t panels, chunk, chunks, small, items;
} Deal;

INLINE Deal deal_panels(int64_t n, int32_t threads) {
    int64_t panels = (n + 2 * WIDTH - 1) / (2 * WIDTH) * 2;
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

#endif
