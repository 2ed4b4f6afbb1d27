/* A decode step that follows another one of the same sequences. See decodes.c. */
#ifndef PAWL_DECODES_H
#define PAWL_DECODES_H

#include <stdint.h>

#define MOST_ROTARIES 4

typedef struct {
    const int64_t *rows;     /* of the worker's table, [count] */
    int32_t *known;          /* token ids by row of that table, [rows, known_stride] */
    int64_t *num_tokens, *num_computed; /* of each row of that table: known, and with keys and values, [rows] */
    const int64_t *capacity; /* tokens that the blocks of each sequence hold, [count] */
    int64_t *positions, *token_ids, *slots; /* of the token that each sequence computes, [count] */
    int64_t *sampled_at, *num_output;       /* of the token that it samples, [count] */
    const int64_t *tables;                  /* [count, table_stride] */
    int64_t *tiles;                         /* as in attention.h, [num_tiles, TILE_FIELDS] */
    const float *all_cosines[MOST_ROTARIES], *all_sines[MOST_ROTARIES]; /* by position, [positions, turned] */
    float *cosines[MOST_ROTARIES], *sines[MOST_ROTARIES];               /* [count, turned] */
    int64_t turned[MOST_ROTARIES];
    int64_t count, num_tiles, known_stride, table_stride, num_rotaries;
    int64_t moved; /* set: 0 where a sequence has no block for its next token or comes to another split */
} Decodes;

#endif
