/* Paged attention that reads keys and values where they lie.

   Cache of a layer: keys [blocks, K, head_dim, 32] (transposed inside a block), values [blocks, K, 32, head_dim].
   Keys are taken in splits at fixed absolute positions and merged in order; inside a split every sum runs over the keys
   in order. A hidden key weighs exactly 0, which changes no sum. So the bits of a query's result depend on its own
   sequence alone: not on the batch, the chunk, the tile it is computed in, or the number of threads.

   Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, for the merge; Dao et al.,
   "FlashAttention", 2022, for the tiling. */
#include <omp.h>

#include "vector.h"

#define BLOCK 32
#define SPLIT 512
#define MOST_ROWS 24   /* query rows of a tile: tokens times heads of one key-value head */
#define MOST_DIM 512
#define ROWS 3         /* 3 x 32 floats of sums fill twelve of sixteen registers */

typedef struct {
    const float *q;
    float *out;
    const float *keys, *values;
    const int64_t *tables;
    int64_t table_stride, heads, kv_heads, head_dim, padded; /* padded: head_dim in the cache, a multiple of 8 */
    int64_t window; /* keys that a query sees, its own included */
    float scale, softcap; /* softcap 0: none */
    const float *sinks; /* [H] or NULL */
} Step;

typedef struct {
    float queries[MOST_ROWS][MOST_DIM], sums[MOST_ROWS][MOST_DIM], scores[MOST_ROWS][SPLIT];
    float maximum[MOST_ROWS], total[MOST_ROWS];
} Scratch;

/* sums[r][0..32) += a[r][i] * b[i * stride + 0..32) over i in order. */
INLINE void product(int rows, int columns, const float *a, int64_t a_stride, const float *b, int64_t stride, int64_t n,
                    v8 *sums) {
    for (int64_t i = 0; i < n; i++) {
        v8 right[4];
        for (int c = 0; c < columns; c++) right[c] = load8(b + i * stride + c * LANES);
        for (int r = 0; r < rows; r++) {
            v8 left = all8(a[r * a_stride + i]);
            for (int c = 0; c < columns; c++) sums[r * 4 + c] = fma8(left, right[c], sums[r * 4 + c]);
        }
    }
}

INLINE void score_block(int rows, const Scratch *s, int row, const float *keys, int64_t head_dim, float *scores) {
    v8 sums[ROWS * 4];
    for (int i = 0; i < ROWS * 4; i++) sums[i] = all8(0.0f);
    product(rows, 4, s->queries[row], MOST_DIM, keys, BLOCK, head_dim, sums);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 4; c++) store8(scores + r * SPLIT + c * LANES, sums[r * 4 + c]);
}

/* Rows row.. of the tile, dimensions dim.. of the values, over all keys of a split. */
INLINE void add_values(int rows, int columns, Scratch *s, int row, int64_t dim, const Step *step, const int64_t *table,
                       int64_t head, int64_t start, int64_t num_keys) {
    v8 sums[ROWS * 4];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) sums[r * 4 + c] = load8(&s->sums[row + r][dim + c * LANES]);
    for (int64_t key = start; key < num_keys; key += BLOCK) {
        const float *values = step->values + ((table[key / BLOCK] * step->kv_heads + head) * BLOCK) * step->padded + dim;
        int64_t n = num_keys - key < BLOCK ? num_keys - key : BLOCK;
        product(rows, columns, &s->scores[row][key], SPLIT, values, step->padded, n, sums);
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) store8(&s->sums[row + r][dim + c * LANES], sums[r * 4 + c]);
}

#define BY_ROWS(rows, CALL)    \
    switch (rows) {            \
        case 1: CALL(1); break; \
        case 2: CALL(2); break; \
        default: CALL(3);      \
    }

/* One split: scores, weights, and what the rows gather. */
static void attend_split(const Step *step, Scratch *s, const int64_t *table, int64_t head, int rows, int64_t first_key,
                         int64_t num_keys, const int64_t *visible) {
    int64_t dims = step->padded, start = visible[0] - step->window - first_key; /* no row sees an earlier key */
    start = start > 0 ? start / BLOCK * BLOCK : 0;
    for (int64_t key = start; key < num_keys; key += BLOCK) {
        int64_t block = table[key / BLOCK];
        const float *keys = step->keys + (block * step->kv_heads + head) * dims * BLOCK;
        if (key + BLOCK < num_keys) {
            const char *next = (const char *)(step->keys + (table[key / BLOCK + 1] * step->kv_heads + head) * dims * BLOCK);
            for (int64_t i = 0; i < dims * BLOCK * 4; i += 64) __builtin_prefetch(next + i, 0, 2);
        }
        for (int row = 0; row < rows; row += ROWS) {
#define SCORE(R) score_block(R, s, row, keys, dims, &s->scores[row][key])
            BY_ROWS(rows - row, SCORE)
        }
    }
    for (int row = 0; row < rows; row++) {
        float *scores = s->scores[row];
        int64_t seen = visible[row] - first_key; /* keys of this split that the row may see end here */
        int64_t past = seen - step->window;      /* and begin here */
        if (seen <= 0 || past >= num_keys) {
            memset(scores, 0, (size_t)num_keys * sizeof *scores);
            continue;
        }
        if (seen > num_keys) seen = num_keys;
        int64_t padded = (num_keys + LANES - 1) / LANES * LANES;
        if (step->softcap != 0.0f)
            for (int64_t i = start; i < padded; i += LANES)
                store8(scores + i, all8(step->softcap) * tanh8(load8(scores + i) / all8(step->softcap)));
        for (int64_t i = 0; i < past; i++) scores[i] = -INFINITY;
        for (int64_t i = seen; i < padded; i++) scores[i] = -INFINITY;
        v8 most = load8(scores + start);
        for (int64_t i = start + LANES; i < padded; i += LANES) most = max8(most, load8(scores + i));
        float maximum = largest8(most);
        if (s->maximum[row] > maximum) maximum = s->maximum[row];
        v8 total = all8(0.0f);
        for (int64_t i = start; i < padded; i += LANES) {
            v8 weight = exp8(load8(scores + i) - all8(maximum));
            total += weight;
            store8(scores + i, weight);
        }
        if (s->maximum[row] != maximum) {
            v8 kept = exp8(all8(s->maximum[row] - maximum));
            s->total[row] *= kept[0];
            for (int64_t i = 0; i < dims; i += LANES) store8(&s->sums[row][i], load8(&s->sums[row][i]) * kept);
        }
        s->total[row] += sum8(total);
        s->maximum[row] = maximum;
    }
    for (int row = 0; row < rows; row += ROWS) {
        int64_t dim = 0;
        for (; dim + 32 <= dims; dim += 32) {
#define ADD_FOUR(R) add_values(R, 4, s, row, dim, step, table, head, start, num_keys)
            BY_ROWS(rows - row, ADD_FOUR)
        }
        for (; dim < dims; dim += LANES) {
#define ADD_ONE(R) add_values(R, 1, s, row, dim, step, table, head, start, num_keys)
            BY_ROWS(rows - row, ADD_ONE)
        }
    }
}

/* Some queries of one sequence: consecutive tokens times heads of one key-value head. */
static void attend_tile(const Step *step, Scratch *s, const int64_t *tile, int64_t head) {
    int64_t sequence = tile[0], first_row = tile[1], first_position = tile[2], tokens = tile[3], heads = tile[5];
    int64_t first_head = head * (step->heads / step->kv_heads) + tile[4];
    int64_t dims = step->head_dim, visible[MOST_ROWS];
    int rows = (int)(tokens * heads);
    for (int row = 0; row < rows; row++) {
        const float *q = step->q + ((first_row + row / heads) * step->heads + first_head + row % heads) * dims;
        visible[row] = first_position + row / heads + 1;
        for (int64_t i = 0; i < dims; i++) s->queries[row][i] = q[i] * step->scale;
        for (int64_t i = dims; i < step->padded; i++) s->queries[row][i] = 0.0f;
        memset(s->sums[row], 0, (size_t)step->padded * sizeof(float));
        s->maximum[row] = step->sinks ? step->sinks[first_head + row % heads] : -INFINITY;
        s->total[row] = step->sinks ? 1.0f : 0.0f;
    }
    const int64_t *table = step->tables + sequence * step->table_stride;
    int64_t num_keys = first_position + tokens;
    int64_t first_seen = visible[0] > step->window ? visible[0] - step->window : 0;
    for (int64_t key = first_seen / SPLIT * SPLIT; key < num_keys; key += SPLIT)
        attend_split(step, s, table + key / BLOCK, head, rows, key, num_keys - key < SPLIT ? num_keys - key : SPLIT,
                     visible);
    for (int row = 0; row < rows; row++) {
        float *out = step->out + ((first_row + row / heads) * step->heads + first_head + row % heads) * dims;
        for (int64_t i = 0; i < dims; i++) out[i] = s->sums[row][i] / s->total[row];
    }
}

int64_t pawl_scratch_bytes(void) { return (int64_t)sizeof(Scratch); }

/* q and out [T, H, head_dim]; tables [S, table_stride]; tiles [num_tiles, 6]: sequence, row of the first token in q, its
   position, tokens, first head inside the group of a key-value head, heads (tokens x heads <= 24);
   scratch: threads times pawl_scratch_bytes. In the cache head_dim is padded to a multiple of 8, at most 512. A query sees
   the last `window` keys, its own included; softcap 0 = none; sinks [H] or NULL: scores that bring no value. */
void pawl_attend(const float *q, float *out, const float *keys, const float *values, const int64_t *tables,
                 const int64_t *tiles, char *scratch, int64_t num_tiles, int64_t table_stride, int64_t heads,
                 int64_t kv_heads, int64_t head_dim, int64_t padded, int64_t window, float scale, float softcap,
                 const float *sinks, int32_t threads) {
    Step step = {q,        out,    keys,   values, tables,  table_stride, heads,
                 kv_heads, head_dim, padded, window, scale, softcap,      sinks};
    int64_t items = num_tiles * kv_heads;
#pragma omp parallel num_threads(threads)
    {
        Scratch *own = (Scratch *)scratch + omp_get_thread_num();
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < items; item++) attend_tile(&step, own, tiles + item / kv_heads * 6, item % kv_heads);
    }
}
