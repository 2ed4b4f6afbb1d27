/* Paged attention that reads keys and values where they lie.

   Cache of a layer: keys [blocks, K, padded, 32] (transposed inside a block), values [blocks, K, 32, padded], in fp32, in
   fp16, or in bytes, where 32 scales (fp32, one per token) follow the bytes of each block and head.
   Keys are taken in splits at fixed absolute positions, each by itself, and merged in order; inside a split every sum
   runs over the keys in order. A hidden key weighs exactly 0, which changes no sum. So the bits of a query's result
   depend on its own sequence alone: not on the batch, the chunk, the tile it is computed in, or the number of threads.

   Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, for the merge; Dao et al.,
   "FlashAttention", 2022, for the tiling; Hong et al., "FlashDecoding++", 2023, for splits in parallel. */
#include "attention.h"

#include <omp.h>

#include "linear.h"
#include "vector.h"

#define COLUMNS (32 / WIDTH)

#if WIDTH == 16
#define ROWS 12 /* 12 x 32 floats of sums fill 24 of 32 registers */
#define MOST_SUMS 24
#else
#define ROWS 3 /* 3 x 32 floats of sums fill 12 of 16 registers */
#define MOST_SUMS 12
#endif

/* From row to row: no power of 2, since the first-level cache keeps few lines that lie so far apart. */
#define DIM_STRIDE (MOST_DIM + 16)
#define SCORE_STRIDE (SPLIT + 16)

typedef struct {
    float queries[MOST_ROWS][DIM_STRIDE], scores[MOST_ROWS][SCORE_STRIDE];
    float split_sums[MOST_ROWS][DIM_STRIDE], split_maximum[MOST_ROWS], split_total[MOST_ROWS];
    float sums[MOST_ROWS][DIM_STRIDE], maximum[MOST_ROWS], total[MOST_ROWS];
    float widened[MOST_DIM * BLOCK]; /* a block of keys or values */
} Scratch;

/* What the rows of a tile share. */
typedef struct {
    const Attention *step;
    const int64_t *table;
    int64_t head, first_head, heads, first_row, num_keys;
    int rows;
    int64_t visible[MOST_ROWS]; /* keys up to and with a row's own */
} Tile;

INLINE vw element_at(int format, const char *p, int64_t i) {
    switch (format) {
        case FLOAT: return loadw((const float *)p + i);
        case HALF: return halfw((const uint16_t *)p + i);
        default: return bytew((const int8_t *)p + i);
    }
}

/* sums[r][0 .. columns * WIDTH) += a[r][i] * b[i * stride + 0 ..) over i in order. */
INLINE void product(int format, int rows, int columns, const float *a, int64_t a_stride, const char *b, int64_t stride,
                    int64_t n, vw *sums) {
    for (int64_t i = 0; i < n; i++) {
        vw right[64 / WIDTH]; /* the most that are asked for, see DIMS_AT_ONCE */
        for (int c = 0; c < columns; c++) right[c] = element_at(format, b, i * stride + c * WIDTH);
        for (int r = 0; r < rows; r++) {
            vw left = allw(a[r * a_stride + i]);
            for (int c = 0; c < columns; c++) sums[r * columns + c] = fmaw(left, right[c], sums[r * columns + c]);
        }
    }
}

/* scales: of each key, or NULL. */
INLINE void score_block(int format, int rows, Scratch *s, int row, const char *keys, const float *scales, int64_t dims,
                        int64_t key) {
    vw sums[ROWS * COLUMNS];
    for (int i = 0; i < rows * COLUMNS; i++) sums[i] = allw(0.0f);
    product(format, rows, COLUMNS, s->queries[row], DIM_STRIDE, keys, BLOCK, dims, sums);
    for (int c = 0; c < COLUMNS; c++) {
        vw scale = scales ? loadw(scales + c * WIDTH) : allw(1.0f);
        for (int r = 0; r < rows; r++) {
            vw sum = sums[r * COLUMNS + c];
            storew(&s->scores[row + r][key + c * WIDTH], scales ? sum * scale : sum);
        }
    }
}

/* Rows row.. of the tile, dimensions dim.. of the values, over the keys of a split from `start` on. */
INLINE void add_values(int format, int rows, int columns, const Tile *t, Scratch *s, int row, int64_t dim,
                       const int64_t *table, int64_t start, int64_t num_keys) {
    const Attention *step = t->step;
    int64_t bytes = cache_bytes(format, step->padded), size = format == FLOAT ? 4 : format == HALF ? 2 : 1;
    vw sums[MOST_SUMS];
    for (int i = 0; i < rows * columns; i++) sums[i] = allw(0.0f);
    for (int64_t key = start; key < num_keys; key += BLOCK) {
        const char *values = step->values + (table[key / BLOCK] * step->kv_heads + t->head) * bytes + dim * size;
        int64_t n = num_keys - key < BLOCK ? num_keys - key : BLOCK;
        product(format, rows, columns, &s->scores[row][key], SCORE_STRIDE, values, step->padded, n, sums);
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) storew(&s->split_sums[row + r][dim + c * WIDTH], sums[r * columns + c]);
}

/* The same over one block, widened, after those before it. */
INLINE void add_widened(int rows, int columns, Scratch *s, int row, int64_t dim, int64_t dims, int64_t key, int64_t n,
                        int begin) {
    vw sums[ROWS * COLUMNS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++)
            sums[r * columns + c] = begin ? allw(0.0f) : loadw(&s->split_sums[row + r][dim + c * WIDTH]);
    product(FLOAT, rows, columns, &s->scores[row][key], SCORE_STRIDE, (const char *)(s->widened + dim), dims, n, sums);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) storew(&s->split_sums[row + r][dim + c * WIDTH], sums[r * columns + c]);
}

static void widen(int format, const char *block, int64_t count, float *to) {
    if (format == HALF)
        for (int64_t i = 0; i < count; i += WIDTH) storew(to + i, element_at(HALF, block, i));
    else
        for (int64_t i = 0; i < count; i += WIDTH) storew(to + i, element_at(BYTE, block, i));
}

/* A function for each format and number of rows. */
typedef void Scores(Scratch *s, int row, const char *keys, const float *scales, int64_t dims, int64_t key);
typedef void Values(const Tile *t, Scratch *s, int row, const int64_t *table, int64_t start, int64_t num_keys);
typedef void Widened(Scratch *s, int row, int64_t dims, int64_t key, int64_t n, int begin);

/* Of few rows more dimensions at a time: enough sums that do not wait for each other. */
#define DIMS_AT_ONCE(rows) ((rows) * 64 / WIDTH <= MOST_SUMS / 2 ? 64 : 32)
#define BOTH(format, rows)                                                                                           \
    static void scores_##format##_##rows(Scratch *s, int row, const char *keys, const float *scales, int64_t dims,   \
                                         int64_t key) {                                                              \
        score_block(format, rows, s, row, keys, scales, dims, key);                                                  \
    }                                                                                                                \
    static void values_##format##_##rows(const Tile *t, Scratch *s, int row, const int64_t *table, int64_t start,    \
                                         int64_t num_keys) {                                                         \
        int64_t dim = 0, dims = t->step->padded;                                                                     \
        if (DIMS_AT_ONCE(rows) == 64)                                                                                \
            for (; dim + 64 <= dims; dim += 64)                                                                      \
                add_values(format, rows, 64 / WIDTH, t, s, row, dim, table, start, num_keys);                        \
        for (; dim + 32 <= dims; dim += 32)                                                                          \
            add_values(format, rows, COLUMNS, t, s, row, dim, table, start, num_keys);                               \
        for (; dim < dims; dim += WIDTH) add_values(format, rows, 1, t, s, row, dim, table, start, num_keys);        \
    }
#define WIDENED(format, rows)                                                                                        \
    static void widened_##rows(Scratch *s, int row, int64_t dims, int64_t key, int64_t n, int begin) {               \
        int64_t dim = 0;                                                                                             \
        for (; dim + 32 <= dims; dim += 32) add_widened(rows, COLUMNS, s, row, dim, dims, key, n, begin);            \
        for (; dim < dims; dim += WIDTH) add_widened(rows, 1, s, row, dim, dims, key, n, begin);                     \
    }
#define THREE(format, DO) DO(format, 1) DO(format, 2) DO(format, 3)
#if WIDTH == 16
#define ALL(format, DO)                                                                                      \
    THREE(format, DO) DO(format, 4) DO(format, 5) DO(format, 6) DO(format, 7) DO(format, 8) DO(format, 9)    \
    DO(format, 10) DO(format, 11) DO(format, 12)
#else
#define ALL(format, DO) THREE(format, DO)
#endif
#define SCORES_NAME(format, rows) scores_##format##_##rows,
#define VALUES_NAME(format, rows) values_##format##_##rows,
#define WIDENED_NAME(format, rows) widened_##rows,
ALL(FLOAT, BOTH)
ALL(HALF, BOTH)
ALL(BYTE, BOTH)
ALL(FLOAT, WIDENED)
static Scores *const SCORES[4][ROWS + 1] = {
    [FLOAT] = {0, ALL(FLOAT, SCORES_NAME)}, [HALF] = {0, ALL(HALF, SCORES_NAME)}, [BYTE] = {0, ALL(BYTE, SCORES_NAME)}};
static Values *const VALUES[4][ROWS + 1] = {
    [FLOAT] = {0, ALL(FLOAT, VALUES_NAME)}, [HALF] = {0, ALL(HALF, VALUES_NAME)}, [BYTE] = {0, ALL(BYTE, VALUES_NAME)}};
static Widened *const ADD_WIDENED[ROWS + 1] = {0, ALL(FLOAT, WIDENED_NAME)};

/* Scores of one row become weights; keys outside of [past, seen) weigh 0. */
static void weigh(const Attention *step, Scratch *s, int row, int64_t start, int64_t num_keys, int64_t past,
                  int64_t seen) {
    float *scores = s->scores[row];
    if (seen <= 0 || past >= num_keys) {
        memset(scores + start, 0, (size_t)(num_keys - start) * sizeof *scores);
        s->split_maximum[row] = -INFINITY;
        s->split_total[row] = 0.0f;
        return;
    }
    if (seen > num_keys) seen = num_keys;
    int64_t padded = (num_keys + LANES - 1) / LANES * LANES;
    if (step->softcap != 0.0f)
        for (int64_t i = start; i < padded; i += LANES)
            store8(scores + i, all8(step->softcap) * tanh8(load8(scores + i) / all8(step->softcap)));
    for (int64_t i = start; i < past; i++) scores[i] = -INFINITY;
    for (int64_t i = seen; i < padded; i++) scores[i] = -INFINITY;
    v8 most = load8(scores + start);
    for (int64_t i = start + LANES; i < padded; i += LANES) most = max8(most, load8(scores + i));
    float maximum = largest8(most);
    v8 total = all8(0.0f);
    int64_t i = start;
#if WIDTH == 16
    for (; i + WIDTH <= padded; i += WIDTH) {
        vw weight = exp16(loadw(scores + i) - allw(maximum));
        storew(scores + i, weight);
        total += load8(scores + i);
        total += load8(scores + i + LANES);
    }
#endif
    for (; i < padded; i += LANES) {
        v8 weight = exp8(load8(scores + i) - all8(maximum));
        total += weight;
        store8(scores + i, weight);
    }
    s->split_maximum[row] = maximum;
    s->split_total[row] = sum8(total);
}

/* The values' scales go into the weights: after they are added up. */
static void weigh_bytes(const Tile *t, Scratch *s, int row, const int64_t *table, int64_t start, int64_t num_keys) {
    const Attention *step = t->step;
    int64_t bytes = cache_bytes(BYTE, step->padded);
    for (int64_t key = start; key < num_keys; key += BLOCK) {
        const char *block = step->values + (table[key / BLOCK] * step->kv_heads + t->head) * bytes;
        const float *scales = (const float *)(block + step->padded * BLOCK);
        for (int64_t i = 0; i < BLOCK; i += LANES)
            store8(&s->scores[row][key + i], load8(&s->scores[row][key + i]) * load8(scales + i));
    }
}

INLINE int rows_at_once(int rows) {
    int passes = (rows + ROWS - 1) / ROWS;
    return (rows + passes - 1) / passes;
}

/* One split of a tile by itself: maximum, total, and what each row gathers. */
static void attend_split(const Tile *t, Scratch *s, int64_t first_key) {
    const Attention *step = t->step;
    const int64_t *table = t->table + first_key / BLOCK;
    int64_t num_keys = t->num_keys - first_key < SPLIT ? t->num_keys - first_key : SPLIT;
    int64_t start = t->visible[0] - step->window - first_key; /* no row sees an earlier key */
    start = start > 0 ? start / BLOCK * BLOCK : 0;
    int64_t dims = step->padded, bytes = cache_bytes(step->format, dims);
    int rows = t->rows, at_once = rows_at_once(rows);
    int format = step->format, wide = format != FLOAT && rows > at_once; /* a block is widened once for all rows */
    for (int64_t key = start; key < num_keys; key += BLOCK) {
        const char *keys = step->keys + (table[key / BLOCK] * step->kv_heads + t->head) * bytes;
        const char *values = step->values + (table[key / BLOCK] * step->kv_heads + t->head) * bytes, *next = values;
        if (key + BLOCK < num_keys) next = step->keys + (table[key / BLOCK + 1] * step->kv_heads + t->head) * bytes;
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
        if (rows == at_once) /* else there is more to compute than to read */
            for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(values + i, 0, 2);
        const float *scales = format == BYTE ? (const float *)(keys + dims * BLOCK) : NULL;
        if (wide) widen(format, keys, dims * BLOCK, s->widened);
        for (int row = 0; row < rows; row += at_once) {
            Scores *score = SCORES[wide ? FLOAT : format][rows - row < at_once ? rows - row : at_once];
            score(s, row, wide ? (const char *)s->widened : keys, scales, dims, key);
        }
    }
    for (int row = 0; row < rows; row++) {
        int64_t seen = t->visible[row] - first_key;
        weigh(step, s, row, start, num_keys, seen - step->window, seen);
        if (format == BYTE) weigh_bytes(t, s, row, table, start, num_keys);
    }
    for (int row = 0; row < rows && !wide; row += at_once)
        VALUES[format][rows - row < at_once ? rows - row : at_once](t, s, row, table, start, num_keys);
    for (int64_t key = start; key < num_keys && wide; key += BLOCK) {
        const char *values = step->values + (table[key / BLOCK] * step->kv_heads + t->head) * bytes;
        int64_t n = num_keys - key < BLOCK ? num_keys - key : BLOCK;
        widen(format, values, n * dims, s->widened);
        for (int row = 0; row < rows; row += at_once)
            ADD_WIDENED[rows - row < at_once ? rows - row : at_once](s, row, dims, key, n, key == start);
    }
}

/* total, maximum and sums become those of both parts. */
INLINE void merge(float *maximum, float *total, float *sums, float other_maximum, float other_total, const float *other,
                  int64_t dims) {
    if (other_maximum == -INFINITY) return; /* nothing seen there */
    float both = *maximum > other_maximum ? *maximum : other_maximum;
    v8 kept = exp8(all8(*maximum - both)), added = exp8(all8(other_maximum - both));
    for (int64_t i = 0; i < dims; i += LANES)
        store8(sums + i, fma8(load8(other + i), added, load8(sums + i) * kept));
    *total = *total * kept[0] + other_total * added[0];
    *maximum = both;
}

static void begin(const Tile *t, Scratch *s, int row) {
    const Attention *step = t->step;
    memset(s->sums[row], 0, (size_t)step->padded * sizeof(float));
    s->maximum[row] = step->sinks ? step->sinks[t->first_head + row % t->heads] : -INFINITY;
    s->total[row] = step->sinks ? 1.0f : 0.0f;
}

static void finish(const Tile *t, Scratch *s, int row) {
    int64_t dims = t->step->head_dim;
    float *out = t->step->out + ((t->first_row + row / t->heads) * t->step->heads + t->first_head + row % t->heads) * dims;
    for (int64_t i = 0; i < dims; i++) out[i] = s->sums[row][i] / s->total[row];
}

static Tile tile_of(const Attention *step, const int64_t *fields, int64_t head) {
    Tile t = {.step = step,
              .table = step->tables + fields[SEQUENCE] * step->table_stride,
              .head = head,
              .first_head = head * (step->heads / step->kv_heads) + fields[FIRST_HEAD],
              .heads = fields[HEADS],
              .first_row = fields[FIRST_ROW],
              .num_keys = fields[FIRST_POSITION] + fields[TOKENS],
              .rows = (int)(fields[TOKENS] * fields[HEADS])};
    for (int row = 0; row < t.rows; row++) t.visible[row] = fields[FIRST_POSITION] + row / t.heads + 1;
    return t;
}

static void take_queries(const Tile *t, Scratch *s) {
    const Attention *step = t->step;
    for (int row = 0; row < t->rows; row++) {
        const float *q = step->q + ((t->first_row + row / t->heads) * step->heads + t->first_head + row % t->heads) * step->head_dim;
        for (int64_t i = 0; i < step->head_dim; i++) s->queries[row][i] = q[i] * step->scale;
        for (int64_t i = step->head_dim; i < step->padded; i++) s->queries[row][i] = 0.0f;
    }
}

static void attend_tile(const Tile *t, Scratch *s) {
    take_queries(t, s);
    for (int row = 0; row < t->rows; row++) begin(t, s, row);
    int64_t first_seen = t->visible[0] > t->step->window ? t->visible[0] - t->step->window : 0;
    for (int64_t key = first_seen / SPLIT * SPLIT; key < t->num_keys; key += SPLIT) {
        attend_split(t, s, key);
        for (int row = 0; row < t->rows; row++)
            merge(&s->maximum[row], &s->total[row], s->sums[row], s->split_maximum[row], s->split_total[row],
                  s->split_sums[row], t->step->padded);
    }
    for (int row = 0; row < t->rows; row++) finish(t, s, row);
}

INLINE float *partial_of(const Attention *step, int64_t pair, int64_t head, int row) {
    return step->partials + ((pair * step->kv_heads + head) * MOST_ROWS + row) * (step->padded + 2);
}

static void attend_pair(const Attention *step, Scratch *s, int64_t pair, int64_t head) {
    const int64_t *which = step->pairs + pair * 2;
    Tile t = tile_of(step, step->tiles + which[0] * TILE_FIELDS, head);
    int64_t first_seen = t.visible[0] > step->window ? t.visible[0] - step->window : 0;
    int seen = (which[1] + 1) * SPLIT > first_seen;
    if (seen) {
        take_queries(&t, s);
        attend_split(&t, s, which[1] * SPLIT);
    }
    for (int row = 0; row < t.rows; row++) {
        float *partial = partial_of(step, pair, head, row);
        partial[0] = seen ? s->split_maximum[row] : -INFINITY;
        partial[1] = s->split_total[row];
        if (seen) memcpy(partial + 2, s->split_sums[row], (size_t)step->padded * sizeof(float));
    }
}

int64_t attention_scratch_bytes(void) { return (int64_t)sizeof(Scratch); }

void attention_part(const Attention *step, int64_t *next, char *scratch) {
    int64_t items = (step->pairs ? step->num_pairs : step->num_tiles) * step->kv_heads;
    for (;;) {
        int64_t item = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (item >= items) return;
        if (step->pairs) {
            attend_pair(step, (Scratch *)scratch, item / step->kv_heads, item % step->kv_heads);
            continue;
        }
        Tile t = tile_of(step, step->tiles + item / step->kv_heads * TILE_FIELDS, item % step->kv_heads);
        attend_tile(&t, (Scratch *)scratch);
    }
}

void merge_part(const Attention *step, int64_t *next, char *scratch) {
    Scratch *s = (Scratch *)scratch;
    for (;;) {
        int64_t item = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (item >= step->num_tiles * step->kv_heads) return;
        const int64_t *fields = step->tiles + item / step->kv_heads * TILE_FIELDS;
        Tile t = tile_of(step, fields, item % step->kv_heads);
        for (int row = 0; row < t.rows; row++) {
            begin(&t, s, row);
            for (int64_t split = 0; split * SPLIT < t.num_keys; split++) {
                const float *partial = partial_of(step, fields[FIRST_PAIR] + split, t.head, row);
                merge(&s->maximum[row], &s->total[row], s->sums[row], partial[0], partial[1], partial + 2, step->padded);
            }
            finish(&t, s, row);
        }
    }
}

/* scratch: threads times pawl_scratch_bytes. */
void pawl_attend(const Attention *step, char *scratch, int32_t threads) {
    int64_t next[2] = {0, 0};
#pragma omp parallel num_threads(threads)
    {
        char *own = scratch + omp_get_thread_num() * attention_scratch_bytes();
        attention_part(step, &next[0], own);
        if (step->pairs) {
#pragma omp barrier
            merge_part(step, &next[1], own);
        }
    }
}

int64_t pawl_scratch_bytes(void) { return attention_scratch_bytes(); }
