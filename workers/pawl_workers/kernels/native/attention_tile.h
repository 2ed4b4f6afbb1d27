/* What attention.c and attention_group.c share: a tile of query rows, and a split of the keys that they see. */
#ifndef PAWL_ATTENTION_TILE_H
#define PAWL_ATTENTION_TILE_H

#include "attention_rows.h"
#include "vector.h"

typedef struct {
    Rows group;
    float split_maximum[GROUP_ROWS], split_total[GROUP_ROWS];
    float maximum[MOST_ROWS], total[MOST_ROWS]; /* of all rows of a tile, and their sums, [rows][padded] */
    _Alignas(64) float sums[MOST_ROWS * MOST_DIM];
    _Alignas(64) float keys[SPLIT * MOST_DIM], values[SPLIT * MOST_DIM]; /* of a split, widened */
} Scratch;

/* What the rows of a tile share. */
typedef struct {
    const Attention *step;
    const int64_t *table;
    int64_t head, first_head, heads, first_row, first_position, num_keys;
    int rows, groups;
} Tile;

/* The first blocks of some keys, which are fetched before they are read; NULL: none. */
typedef struct {
    const char *blocks[MOST_AHEAD];
} Ahead;

/* What they share in a split: its blocks, in fp32 once they are widened, and up to where they are. */
typedef struct {
    int64_t first_key, wide_keys, wide_values;
    const char *keys[SPLIT_BLOCKS], *values[SPLIT_BLOCKS];
    const float *key_scales[SPLIT_BLOCKS], *value_scales[SPLIT_BLOCKS];
    Ahead then; /* what is read after it */
    int scaled, widened;
} Split;

/* A row of a tile, counted on without dividing. */
typedef struct {
    int row;
    int64_t token, head;
} Query;

INLINE Query query_of(const Tile *t, int row) { return (Query){row, row / t->heads, row % t->heads}; }

INLINE void next_query(const Tile *t, Query *query) {
    query->row++;
    if (++query->head == t->heads) query->head = 0, query->token++;
}

/* Keys up to and with its own. */
INLINE int64_t visible(const Tile *t, Query query) { return t->first_position + query.token + 1; }

/* In the queries and in what is found. */
INLINE int64_t offset_of(const Tile *t, Query query) {
    int64_t token = t->first_row + query.token, head = t->first_head + query.head;
    return (token * t->step->heads + head) * t->step->head_dim;
}

/* Of a key's block and the tile's head, bytes into the keys and into the values. */
INLINE int64_t block_offset(const Tile *t, int64_t key) {
    const Attention *step = t->step;
    return (t->table[key / BLOCK] * step->kv_heads + t->head) * cache_bytes(step->format, step->padded);
}

/* The blocks from `first_key` on, up to SPLIT keys. then: what is read after them. */
void open_split(const Tile *t, int64_t first_key, Ahead then, Split *split);

/* A split for some rows of a tile, by itself: maximum, total, and what each of them gathers. */
void attend_group(const Tile *t, Scratch *s, Split *split, int first, int rows);

#endif
