/* Linear layers over weights packed once: y = x W^T + b.

   Packed: panels of 16 output features, [ceil(N / 16)][K][16], so that the inner loop reads one stream; in fp32, or in
   fp16 or bf16, which are widened exactly. Every output is a sum over k in order, started at 0, with the bias added
   last: its bits depend neither on the number of rows nor on that of threads, which share the panels out, nor on the
   format. */
#include "vector.h"

#define PANEL 16
#define ROWS 6        /* 6 x 16 floats of sums fill twelve of sixteen registers */
#define ROW_BLOCK 96  /* rows that stay in the second-level cache while a thread passes over its panels */
#define FEW_ROWS 12   /* up to here 16-bit weights are widened in registers; above, once a panel */
#define AHEAD 1024    /* bytes to prefetch ahead */

enum { FLOAT = 0, HALF = 1, BRAIN = 2 };

typedef struct {
    const float *x, *bias;
    float *y;
    int64_t k, n, x_stride, y_stride;
} Product;

INLINE void store_tile(const Product *at, int rows, int panels, int64_t row, int64_t panel, const v8 *sums) {
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < 2 * panels; c++) {
            int64_t column = panel * PANEL + c * LANES;
            float *y = at->y + (row + r) * at->y_stride + column;
            v8 sum = sums[r * 2 * panels + c];
            if (column + LANES <= at->n) {
                if (at->bias) sum += load8(at->bias + column);
                store8(y, sum);
            } else {
                for (int64_t i = 0; column + i < at->n; i++) y[i] = sum[i] + (at->bias ? at->bias[column + i] : 0.0f);
            }
        }
    }
}

/* Per format: TILE, some rows times one or two panels; PANELS, all rows of a block (at most 3) times panels in pairs;
   ONE, some rows times one panel. */
#define DEFINE_FORMAT(TYPE, LOAD, TILE, PANELS, ONE)                                                             \
    INLINE void TILE(const Product *at, int rows, int panels, int64_t row, int64_t panel, const TYPE *w) {       \
        v8 sums[ROWS * 2];                                                                                       \
        const float *x = at->x + row * at->x_stride;                                                             \
        for (int i = 0; i < rows * panels * 2; i++) sums[i] = all8(0.0f);                                        \
        for (int64_t i = 0; i < at->k; i++) {                                                                    \
            v8 weights[4];                                                                                       \
            for (int p = 0; p < panels; p++) {                                                                   \
                const TYPE *from = w + (p * at->k + i) * PANEL;                                                  \
                __builtin_prefetch((const char *)from + AHEAD);                                                  \
                weights[2 * p] = LOAD(from);                                                                     \
                weights[2 * p + 1] = LOAD(from + LANES);                                                         \
            }                                                                                                    \
            for (int r = 0; r < rows; r++) {                                                                     \
                v8 value = all8(x[r * at->x_stride + i]);                                                        \
                for (int c = 0; c < 2 * panels; c++)                                                             \
                    sums[r * 2 * panels + c] = fma8(value, weights[c], sums[r * 2 * panels + c]);                \
            }                                                                                                    \
        }                                                                                                        \
        store_tile(at, rows, panels, row, panel, sums);                                                          \
    }                                                                                                            \
    static void ONE(const Product *at, int rows, int64_t row, int64_t panel, const TYPE *w) {                    \
        switch (rows) {                                                                                          \
            case 1: TILE(at, 1, 1, row, panel, w); break;                                                        \
            case 2: TILE(at, 2, 1, row, panel, w); break;                                                        \
            case 3: TILE(at, 3, 1, row, panel, w); break;                                                        \
            case 4: TILE(at, 4, 1, row, panel, w); break;                                                        \
            case 5: TILE(at, 5, 1, row, panel, w); break;                                                        \
            case 6: TILE(at, 6, 1, row, panel, w); break;                                                        \
        }                                                                                                        \
    }                                                                                                            \
    static void PANELS(const Product *at, const TYPE *w, int64_t first, int64_t end, int64_t row, int rows) {    \
        for (; first + 1 < end; first += 2) {                                                                    \
            const TYPE *from = w + first * at->k * PANEL;                                                        \
            switch (rows) {                                                                                      \
                case 1: TILE(at, 1, 2, row, first, from); break;                                                 \
                case 2: TILE(at, 2, 2, row, first, from); break;                                                 \
                case 3: TILE(at, 3, 2, row, first, from); break;                                                 \
            }                                                                                                    \
        }                                                                                                        \
        if (first < end) ONE(at, rows, row, first, w + first * at->k * PANEL);                                   \
    }

DEFINE_FORMAT(float, load8, tile_float, panels_float, one_float)
DEFINE_FORMAT(uint16_t, half8, tile_half, panels_half, one_half)
DEFINE_FORMAT(uint16_t, brain8, tile_brain, panels_brain, one_brain)

/* Panels from `first` to `end` times rows from `row` to `row_end`, cut into tiles of nearly equal height.
   wide: k * 16 floats to widen a panel in, or NULL. */
static void some_panels(const Product *at, const void *packed, int format, int64_t first, int64_t end, int64_t row,
                        int64_t row_end, float *wide) {
    int64_t rows = row_end - row, size = at->k * PANEL, tiles = (rows + ROWS - 1) / ROWS;
    if (rows <= 3) {
        if (format == FLOAT) panels_float(at, packed, first, end, row, (int)rows);
        else if (format == HALF) panels_half(at, packed, first, end, row, (int)rows);
        else panels_brain(at, packed, first, end, row, (int)rows);
        return;
    }
    for (int64_t panel = first; panel < end; panel++) {
        const uint16_t *narrow = (const uint16_t *)packed + panel * size;
        const float *w = format == FLOAT ? (const float *)packed + panel * size : wide;
        if (wide && format == HALF)
            for (int64_t i = 0; i < size; i += LANES) store8(wide + i, half8(narrow + i));
        if (wide && format == BRAIN)
            for (int64_t i = 0; i < size; i += LANES) store8(wide + i, brain8(narrow + i));
        for (int64_t tile = 0, at_row = row; tile < tiles; tile++) {
            int height = (int)(rows / tiles + (tile < rows % tiles));
            if (w) one_float(at, height, at_row, panel, w);
            else if (format == HALF) one_half(at, height, at_row, panel, narrow);
            else one_brain(at, height, at_row, panel, narrow);
            at_row += height;
        }
    }
}

/* x [m, k] (rows x_stride apart) -> y [m, n] (rows y_stride apart); bias [n] or NULL; format: 0 fp32, 1 fp16, 2 bf16.
   wide: threads * k * 16 floats to widen panels in; not used for fp32. */
void pawl_linear(const float *x, const void *packed, const float *bias, float *y, float *wide, int64_t m, int64_t k,
                 int64_t n, int64_t x_stride, int64_t y_stride, int32_t format, int32_t threads) {
    Product at = {x, bias, y, k, n, x_stride, y_stride};
    int64_t panels = (n + PANEL - 1) / PANEL;
    if (m <= FEW_ROWS || format == FLOAT) wide = NULL;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t thread = 0; thread < threads; thread++) {
        int64_t first = panels * thread / threads, end = panels * (thread + 1) / threads;
        float *own = wide ? wide + thread * k * PANEL : NULL;
        for (int64_t row = 0; row < m; row += ROW_BLOCK)
            some_panels(&at, packed, format, first, end, row, row + ROW_BLOCK < m ? row + ROW_BLOCK : m, own);
    }
}

/* w [n, k] -> panels; columns past n are 0. */
void pawl_pack_float(const float *w, float *packed, int64_t n, int64_t k, int32_t threads) {
    int64_t panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t i = 0; i < k; i++)
            for (int64_t c = 0; c < PANEL; c++) {
                int64_t row = panel * PANEL + c;
                packed[(panel * k + i) * PANEL + c] = row < n ? w[row * k + i] : 0.0f;
            }
}

void pawl_pack_short(const uint16_t *w, uint16_t *packed, int64_t n, int64_t k, int32_t threads) {
    int64_t panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t i = 0; i < k; i++)
            for (int64_t c = 0; c < PANEL; c++) {
                int64_t row = panel * PANEL + c;
                packed[(panel * k + i) * PANEL + c] = row < n ? w[row * k + i] : 0;
            }
}
