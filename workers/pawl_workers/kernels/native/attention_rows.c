/* Products of a few query rows with keys [dims, 32] and values [32, dims] of a block, as many rows at a time as registers
   hold sums for. Every score is a sum over dimensions in order, every result one over keys in order, whatever the number
   of rows and the format, which is widened in registers. */
#include "attention_rows.h"

#include "linear.h"
#include "vector.h"

#define COLUMNS (BLOCK / WIDTH)

#if WIDTH == 16
#define ROWS 12 /* 12 x 32 floats of sums fill 24 of 32 registers */
#define MOST_SUMS 24
#else
#define ROWS 3 /* 3 x 32 floats of sums fill 12 of 16 registers */
#define MOST_SUMS 12
#endif

INLINE vw element_at(int format, const char *p, int64_t i) {
    switch (format) {
        case FLOAT: return loadw((const float *)p + i);
        case HALF: return halfw((const uint16_t *)p + i);
        default: return bytew((const int8_t *)p + i);
    }
}

INLINE int64_t element_bytes(int format) { return format == FLOAT ? 4 : format == HALF ? 2 : 1; }

/* sums[r][0 .. columns * WIDTH) += a[r][i] * b[i * stride + 0 ..) over i in order. The same part of as much of `ahead`
   is fetched, a few bytes with every product: of more at once the products would have to wait for some. */
INLINE void product(int format, int rows, int columns, const float *a, int64_t a_stride, const char *b, int64_t stride,
                    int64_t n, vw *sums, const char *ahead, int64_t num_ahead) {
    int64_t size = element_bytes(format);
    for (int64_t i = 0; i < n; i++) {
        if (i < num_ahead)
            for (int64_t at = 0; at < columns * WIDTH * size; at += LINE)
                __builtin_prefetch(ahead + i * stride * size + at, 0, 2);
        vw right[64 / WIDTH]; /* the most that are asked for, see DIMS_AT_ONCE */
        for (int c = 0; c < columns; c++) right[c] = element_at(format, b, i * stride + c * WIDTH);
        for (int r = 0; r < rows; r++) {
            vw left = allw(a[r * a_stride + i]);
            for (int c = 0; c < columns; c++) sums[r * columns + c] = fmaw(left, right[c], sums[r * columns + c]);
        }
    }
}

INLINE void some_scores(int format, int rows, int columns, const float *queries, const char *keys, const float *scales,
                        int64_t dims, float *scores, const char *ahead) {
    vw sums[ROWS * COLUMNS];
    for (int r = 0; r < rows; r++) /* in one loop over all of them GCC would fill memory first */
        for (int c = 0; c < columns; c++) sums[r * columns + c] = allw(0.0f);
    product(format, rows, columns, queries, DIM_STRIDE, keys, BLOCK, dims, sums, ahead, ahead ? dims : 0);
    for (int c = 0; c < columns; c++) {
        vw scale = scales ? loadw(scales + c * WIDTH) : allw(1.0f);
        for (int r = 0; r < rows; r++) {
            vw sum = sums[r * columns + c];
            storew(scores + r * SCORE_STRIDE + c * WIDTH, scales ? sum * scale : sum);
        }
    }
}

/* Some dimensions of the values, from `dim` on; first: `to` holds nothing yet. */
INLINE void some_values(int format, int rows, int columns, const float *weights, const char *const *blocks, int64_t dims,
                        int64_t dim, int64_t start, int64_t end, int first, float *to, const char *const *then,
                        int64_t far) {
    vw sums[MOST_SUMS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++)
            sums[r * columns + c] = first ? allw(0.0f) : loadw(to + r * DIM_STRIDE + dim + c * WIDTH);
    for (int64_t key = start; key < end; key += BLOCK) {
        int64_t n = end - key < BLOCK ? end - key : BLOCK, size = element_bytes(format);
        const char *values = blocks[key / BLOCK] + dim * size;
        int64_t next = key + far * BLOCK, num_ahead = !then ? 0 : next < end ? end - next : BLOCK;
        const char *ahead = !then ? NULL : next < end ? blocks[next / BLOCK] : then[(next - end) / BLOCK];
        product(format, rows, columns, weights + key, SCORE_STRIDE, values, dims, n, sums,
                ahead ? ahead + dim * size : NULL, num_ahead);
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) storew(to + r * DIM_STRIDE + dim + c * WIDTH, sums[r * columns + c]);
}

/* A function for each format and number of rows. */
typedef void Scores(const float *queries, const char *keys, const float *scales, int64_t dims, float *to, int whole,
                    const char *ahead);
typedef void Values(const float *weights, const char *const *blocks, int64_t dims, int64_t start, int64_t end, int first,
                    float *to, const char *const *then, int64_t far);

/* Of few rows more dimensions at a time: enough sums that do not wait for each other. */
#define DIMS_AT_ONCE(rows) ((rows) * 64 / WIDTH <= MOST_SUMS / 2 ? 64 : 32)
#define BOTH(format, rows)                                                                                             \
    static void scores_##format##_##rows(const float *queries, const char *keys, const float *scales, int64_t dims,    \
                                         float *to, int whole, const char *ahead) {                                    \
        if (whole) some_scores(format, rows, COLUMNS, queries, keys, scales, dims, to, ahead);                         \
        else some_scores(format, rows, COLUMNS / 2, queries, keys, scales, dims, to, ahead);                           \
    }                                                                                                                  \
    static void values_##format##_##rows(const float *weights, const char *const *blocks, int64_t dims,                \
                                         int64_t start, int64_t end, int first, float *to, const char *const *then,    \
                                         int64_t far) {                                                                \
        int64_t dim = 0;                                                                                               \
        if (DIMS_AT_ONCE(rows) == 64)                                                                                  \
            for (; dim + 64 <= dims; dim += 64)                                                                        \
                some_values(format, rows, 64 / WIDTH, weights, blocks, dims, dim, start, end, first, to, then, far);   \
        for (; dim + 32 <= dims; dim += 32)                                                                            \
            some_values(format, rows, COLUMNS, weights, blocks, dims, dim, start, end, first, to, then, far);          \
        for (; dim < dims; dim += WIDTH)                                                                               \
            some_values(format, rows, 1, weights, blocks, dims, dim, start, end, first, to, then, far);                \
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
ALL(FLOAT, BOTH)
ALL(HALF, BOTH)
ALL(BYTE, BOTH)
static Scores *const SCORES[4][ROWS + 1] = {
    [FLOAT] = {0, ALL(FLOAT, SCORES_NAME)}, [HALF] = {0, ALL(HALF, SCORES_NAME)}, [BYTE] = {0, ALL(BYTE, SCORES_NAME)}};
static Values *const VALUES[4][ROWS + 1] = {
    [FLOAT] = {0, ALL(FLOAT, VALUES_NAME)}, [HALF] = {0, ALL(HALF, VALUES_NAME)}, [BYTE] = {0, ALL(BYTE, VALUES_NAME)}};

int passes_of(int rows) { return (rows + ROWS - 1) / ROWS; }

/* In passes of nearly equal height. */
INLINE int rows_at_once(int rows) { return (rows + passes_of(rows) - 1) / passes_of(rows); }

void score_block(Rows *r, int rows, int format, const char *keys, const float *scales, int64_t dims, int64_t key,
                 int64_t num_keys, const char *ahead) {
    int at_once = rows_at_once(rows);
    for (int row = 0; row < rows; row += at_once) {
        Scores *score = SCORES[format][smaller(rows - row, at_once)];
        score(r->queries[row], keys, scales, dims, &r->scores[row][key], num_keys > BLOCK / 2,
              row == 0 ? ahead : NULL);
    }
}

void add_values(Rows *r, int rows, int format, const char *const *blocks, int64_t dims, int64_t start, int64_t end,
                int first, const char *const *then, int64_t far) {
    int at_once = rows_at_once(rows);
    for (int row = 0; row < rows; row += at_once) {
        Values *values = VALUES[format][smaller(rows - row, at_once)];
        values(r->scores[row], blocks, dims, start, end, first, r->sums[row], row == 0 ? then : NULL, far);
    }
}
