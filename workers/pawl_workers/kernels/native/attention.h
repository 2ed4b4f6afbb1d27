/* Paged attention over keys and values where they lie. See attention.c. */
#ifndef PAWL_ATTENTION_H
#define PAWL_ATTENTION_H

#include <stdint.h>

#define BLOCK 32 /* tokens of a block */
#define SPLIT 512
#define LINE 64 /* bytes of the caches */
#define MOST_ROWS 192     /* query rows of a tile: tokens times heads of one key-value head */
#define MOST_PAIR_ROWS 24 /* of a tile whose splits are shared out */
#define MOST_DIM 512

typedef struct {
    const float *q; /* [T, H, head_dim] */
    float *out;     /* likewise */
    const char *keys, *values;
    const int64_t *tables; /* [S, table_stride] */
    const int64_t *tiles;  /* [num_tiles, TILE_FIELDS] */
    const int64_t *pairs;  /* [num_pairs, 2], tile and split, where splits are shared out between threads; or NULL */
    float *partials;       /* num_pairs * K * MOST_PAIR_ROWS * (padded + 2) floats, with pairs */
    const float *sinks;    /* [H] or NULL */
    int64_t num_tiles, num_pairs, table_stride;
    int64_t heads, kv_heads, head_dim, padded; /* padded: head_dim in the cache, a multiple of 16 */
    int64_t window;                            /* keys that a query sees, its own included */
    float scale, softcap;                      /* softcap 0: none */
    int32_t format;                            /* of the cache: FLOAT, HALF or BYTE of linear.h */
} Attention;

/* Of a tile: sequence, row of its first token in q, that token's position, tokens, first head inside the group of a
   key-value head, heads (tokens x heads <= MOST_ROWS), and the first of its pairs. */
enum { SEQUENCE, FIRST_ROW, FIRST_POSITION, TOKENS, FIRST_HEAD, HEADS, FIRST_PAIR, TILE_FIELDS };

/* One thread's share of the tiles (or of the pairs), and then, once all are computed and with pairs, of their merging. */
void attention_part(const Attention *attention, int64_t *next, char *scratch);
void merge_part(const Attention *attention, int64_t *next, char *scratch);
int64_t attention_scratch_bytes(void);

/* Bytes of one block of one head, keys or values. */
static inline int64_t cache_bytes(int32_t format, int64_t padded) {
    return format == 0 ? padded * BLOCK * 4 : format == 1 ? padded * BLOCK * 2 : padded * BLOCK + BLOCK * 4;
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

#endif
