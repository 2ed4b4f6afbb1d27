/* Linear layers in matrix tiles, on processors that have them (AMX). See linear_tiles.c. */
#ifndef PAWL_LINEAR_TILES_H
#define PAWL_LINEAR_TILES_H

#include "linear.h"

/* Whether weights of this format are multiplied in tiles. */
static inline int in_tiles(int format) {
#if defined(__AMX_BF16__)
    return format == BRAIN || format == BYTE || format == CODED;
#else
    (void)format;
    return 0;
#endif
}

/* One thread's share, as linear_part. scratch: tiles_scratch_bytes of its own, aligned to 64. */
void tiles_part(const Linear *linear, int64_t *next, int32_t threads, char *scratch);
int64_t tiles_scratch_bytes(int64_t k);

#endif
