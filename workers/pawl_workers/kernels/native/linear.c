/* Linear layers over weights packed once: y = x W^T + b.

   Packed: panels of as many output features as a register holds, [panels][K][WIDTH], an even number of them, so that the
   inner loop reads a few streams; in fp32, in fp16 or bf16, which are widened exactly, or in bytes with a scale per
   feature, or per feature and group of K. Panels of bf16 are [ceil(K / 2)][WIDTH][2]: two values of k side by side are
   widened by a shift and a mask. Panels of groups hold, for each group, WIDTH scales and [group][WIDTH] bytes: a byte
   times its scale is a weight, rounded to fp32.

   Every output is a sum over k in order, started at 0, scaled (where a feature has one scale) and with the bias added
   last: its bits depend neither on the number of rows nor on that of threads, which share the panels out, nor on the
   width of registers. */
#include "linear.h"

#include <omp.h>
#include <stddef.h>

#include "linear_tiles.h"
#include "panels.h"
#include "vector.h"

#define ROW_BLOCK 96 /* rows that stay in the second-level cache while a thread passes over its panels */
#define AHEAD 1024   /* bytes to prefetch ahead */
#define MOST_PANELS 8
#define MOST_SUMS 24

#if WIDTH == 16
#define ROWS 12 /* 12 rows x 2 panels fill 24 of 32 registers */
#else
#define ROWS 6 /* 6 rows x 2 panels fill 12 of 16 registers */
#endif

/* Bytes of a panel's scales that lie among its weights. */
INLINE int64_t scale_bytes(int shift, int64_t k) { return ((k + (1 << shift) - 1) >> shift) * WIDTH * 4; }

/* The weights of k of one panel. odd: whether k is; shift: binary logarithm of the group. */
INLINE vw weights_at(int format, int shift, int odd, const char *panel, int64_t k) {
    switch (format) {
        case GROUPS: {
            int64_t before = (k >> shift) * WIDTH * 4;
            const char *scales = panel + before + ((k >> shift) << shift) * WIDTH;
            return bytew((const int8_t *)panel + before + WIDTH * 4 + k * WIDTH) * loadw((const float *)scales);
        }
        case FLOAT: return loadw((const float *)panel + k * WIDTH);
        case HALF: return halfw((const uint16_t *)panel + k * WIDTH);
        case BYTE: return bytew((const int8_t *)panel + k * WIDTH);
        default: {
            const uint32_t *pair = (const uint32_t *)panel + (k >> 1) * WIDTH;
            return odd ? odd_brainw(pair) : even_brainw(pair);
        }
    }
}

/* sums += x[k] * weights[k] for one k. bases: every third row of x; the two after it lie `stride` bytes on. */
INLINE void add_products(int format, int shift, int odd, int rows, int panels, const char *const *bases, int64_t stride,
                         const char *const *packed, int64_t k, vw *sums) {
    vw weights[MOST_PANELS];
    for (int p = 0; p < panels; p++) weights[p] = weights_at(format, shift, odd, packed[p], k);
    for (int r = 0; r < rows; r++) {
        vw value = allw(*(const float *)(bases[r / 3] + (r % 3) * stride + k * 4));
        for (int p = 0; p < panels; p++) sums[r * panels + p] = fmaw(value, weights[p], sums[r * panels + p]);
    }
}

/* Some rows times some panels. first: where the panel of that number lies. */
INLINE void tile(const Panels *at, int format, int rows, int panels, int64_t row, int64_t panel, const char *first) {
    const Linear *l = at->linear;
    vw sums[MOST_SUMS];
    const char *bases[(ROWS + 2) / 3], *packed[MOST_PANELS];
    int64_t stride = l->x_stride * 4, k = l->k, bytes = panel_bytes(format, 2), i = 0;
    int shift = l->shift;
    for (int b = 0; b * 3 < rows; b++) bases[b] = (const char *)(l->x + (row + b * 3) * l->x_stride);
    for (int p = 0; p < panels; p++) packed[p] = first + (p & 1) * at->odd_step + (p >> 1) * at->pair_step;
    for (int s = 0; s < rows * panels; s++) sums[s] = allw(0.0f);
    for (; i + 2 <= k; i += 2) {
        if (rows <= 3)
            for (int p = 0; p < panels; p++) __builtin_prefetch(packed[p] + i / 2 * bytes + AHEAD);
        add_products(format, shift, 0, rows, panels, bases, stride, packed, i, sums);
        add_products(format, shift, 1, rows, panels, bases, stride, packed, i + 1, sums);
    }
    if (i < k) add_products(format, shift, 0, rows, panels, bases, stride, packed, i, sums);
    store_tile(l, rows, panels, row, panel, sums);
}

/* A function for each number of rows, for many panels (the fewer the rows, the more) and for two. */
typedef void Tile(const Panels *at, int64_t row, int64_t panel, const char *first);

#define TILE(format, rows, panels)                                                                                   \
    static void tile_##format##_##rows##_##panels(const Panels *at, int64_t row, int64_t panel, const char *first) { \
        tile(at, format, rows, panels, row, panel, first);                                                           \
    }
#define NAME(format, rows, panels) tile_##format##_##rows##_##panels
#define FEW_ROWS(format, DO) DO(format, 1, 8) DO(format, 2, 4) DO(format, 3, 4)
#if WIDTH == 16
#define TILES(format)                                                                                      \
    FEW_ROWS(format, TILE) TILE(format, 4, 4) TILE(format, 5, 4) TILE(format, 6, 4) TILE(format, 1, 2)     \
    TILE(format, 2, 2) TILE(format, 3, 2) TILE(format, 4, 2) TILE(format, 5, 2) TILE(format, 6, 2)         \
    TILE(format, 7, 2) TILE(format, 8, 2) TILE(format, 9, 2) TILE(format, 10, 2) TILE(format, 11, 2)       \
    TILE(format, 12, 2)                                                                                    \
    static Tile *const many_##format[] = {                                                                 \
        NULL, NAME(format, 1, 8), NAME(format, 2, 4), NAME(format, 3, 4), NAME(format, 4, 4),              \
        NAME(format, 5, 4), NAME(format, 6, 4)};                                                           \
    static Tile *const two_##format[] = {                                                                  \
        NULL, NAME(format, 1, 2), NAME(format, 2, 2), NAME(format, 3, 2), NAME(format, 4, 2),              \
        NAME(format, 5, 2), NAME(format, 6, 2), NAME(format, 7, 2), NAME(format, 8, 2), NAME(format, 9, 2), \
        NAME(format, 10, 2), NAME(format, 11, 2), NAME(format, 12, 2)};
#define MANY_ROWS 6 /* up to here tiles of many panels are there */
#else
#define TILES(format)                                                                                       \
    FEW_ROWS(format, TILE) TILE(format, 1, 2) TILE(format, 2, 2) TILE(format, 3, 2) TILE(format, 4, 2)      \
    TILE(format, 5, 2) TILE(format, 6, 2)                                                                   \
    static Tile *const many_##format[] = {NULL, NAME(format, 1, 8), NAME(format, 2, 4), NAME(format, 3, 4)}; \
    static Tile *const two_##format[] = {                                                                   \
        NULL, NAME(format, 1, 2), NAME(format, 2, 2), NAME(format, 3, 2), NAME(format, 4, 2),               \
        NAME(format, 5, 2), NAME(format, 6, 2)};
#define MANY_ROWS 3
#endif
TILES(FLOAT)
TILES(HALF)
TILES(BRAIN)
TILES(BYTE)
TILES(GROUPS)

static Tile *const *const MANY[] = {many_FLOAT, many_HALF, many_BRAIN, many_BYTE, many_GROUPS};
static Tile *const *const TWO[] = {two_FLOAT, two_HALF, two_BRAIN, two_BYTE, two_GROUPS};

INLINE int panels_at_once(int64_t rows) { return rows == 1 ? 8 : rows <= MANY_ROWS ? 4 : 2; }

/* From how many rows on a pair of panels is widened once, and not in each tile. */
INLINE int64_t widened_rows(int format) {
    if (format == FLOAT) return INT64_MAX;
    return WIDTH == 16 && format == BRAIN ? INT64_MAX : 25;
}

int64_t linear_wide_bytes(int64_t k) {
    int64_t wide = (k + 1) / 2 * 2 * WIDTH * 2 * (int64_t)sizeof(float), tiles = tiles_scratch_bytes(k);
    return wide > tiles ? wide : tiles;
}

static void widen(const Linear *l, const char *panel, float *wide) {
    for (int64_t i = 0; i < l->k; i++) storew(wide + i * WIDTH, weights_at(l->format, l->shift, i & 1, panel, i));
}

/* Panels from `first` to `end`, both even, times rows from `row` to `row_end`, in tiles of nearly equal height. */
static void some_panels(const Linear *l, int64_t first, int64_t end, int64_t row, int64_t row_end, float *wide) {
    int64_t rows = row_end - row, tiles = (rows + ROWS - 1) / ROWS, bytes = panel_bytes(l->format, l->k);
    if (l->format == GROUPS) bytes += scale_bytes(l->shift, l->k);
    Panels at = panels_of(l, bytes);
    const char *packed = l->weights;
    int64_t step = panels_at_once((rows + tiles - 1) / tiles);
    for (int64_t panel = first; panel < end;) {
        int many = step > 2 && end - panel >= step;
        const char *from = packed + panel / 2 * at.pair_step;
        Tile *const *by_rows = many ? MANY[l->format] : TWO[l->format];
        Panels use = at;
        if (rows >= widened_rows(l->format)) {
            widen(l, from, wide);
            widen(l, from + at.odd_step, wide + l->k * WIDTH);
            use.odd_step = l->k * WIDTH * 4;
            from = (const char *)wide;
            by_rows = TWO[FLOAT];
        }
        for (int64_t i = 0, at_row = row; i < tiles; i++) {
            int64_t height = rows / tiles + (i < rows % tiles);
            by_rows[height](&use, at_row, panel, from);
            at_row += height;
        }
        panel += many ? step : 2;
    }
}

void linear_part(const Linear *l, int64_t *next, int32_t threads, float *wide) {
    if (in_tiles(l->format)) {
        tiles_part(l, next, threads, (char *)wide);
        return;
    }
    int64_t panels = (l->n + 2 * WIDTH - 1) / (2 * WIDTH) * 2;
    int64_t chunk = panels / (threads * 6); /* some for each thread: one that was held up takes fewer */
    chunk = threads == 1 ? panels : chunk >= 8 ? chunk / 8 * 8 : chunk >= 4 ? 4 : 2;
    for (;;) {
        int64_t first = __atomic_fetch_add(next, chunk, __ATOMIC_RELAXED);
        if (first >= panels) return;
        int64_t end = first + chunk < panels ? first + chunk : panels;
        for (int64_t row = 0; row < l->m; row += ROW_BLOCK)
            some_panels(l, first, end, row, row + ROW_BLOCK < l->m ? row + ROW_BLOCK : l->m, wide);
    }
}

/* wide: threads times pawl_linear_wide_bytes(k). */
void pawl_linear(const Linear *linear, char *wide, int32_t threads) {
    int64_t next = 0;
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num();
        linear_part(linear, &next, threads, (float *)(wide + thread * linear_wide_bytes(linear->k)));
    }
}

int64_t pawl_linear_wide_bytes(int64_t k) { return linear_wide_bytes(k); }

int64_t pawl_panel_width(void) { return WIDTH; }

/* w [n, k], rows of 4, 2 or 1 bytes by the format, and `skip` bytes from row to row -> panels; features past n are 0. */
void pawl_pack(const char *w, char *packed, int64_t n, int64_t k, int64_t skip, int32_t format, int32_t threads) {
    int64_t panels = (n + 2 * WIDTH - 1) / (2 * WIDTH) * 2, bytes = panel_bytes(format, k);
    int size = format == FLOAT ? 4 : format == BYTE ? 1 : 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++) {
        char *to = packed + panel * bytes;
        memset(to, 0, (size_t)bytes);
        for (int64_t c = 0; c < WIDTH && panel * WIDTH + c < n; c++) {
            const char *from = w + (panel * WIDTH + c) * skip;
            for (int64_t i = 0; i < k; i++) {
                int64_t at = format == BRAIN ? (i / 2 * WIDTH + c) * 2 + (i & 1) : i * WIDTH + c;
                memcpy(to + at * size, from + i * size, (size_t)size);
            }
        }
    }
}

/* w [n, k] bytes, scales [n, ceil(k / 2^shift)] -> panels of groups; features past n are 0. */
void pawl_pack_groups(const int8_t *w, const float *scales, char *packed, int64_t n, int64_t k, int32_t shift,
                      int32_t threads) {
    int64_t panels = (n + 2 * WIDTH - 1) / (2 * WIDTH) * 2, group = 1 << shift, groups = (k + group - 1) >> shift;
    int64_t bytes = panel_bytes(GROUPS, k) + scale_bytes(shift, k);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++) {
        char *to = packed + panel * bytes;
        memset(to, 0, (size_t)bytes);
        for (int64_t g = 0; g < groups; g++) {
            int64_t from = g * group, height = k - from < group ? k - from : group;
            for (int64_t c = 0; c < WIDTH && panel * WIDTH + c < n; c++) {
                int64_t feature = panel * WIDTH + c;
                memcpy(to + c * 4, scales + feature * groups + g, 4);
                for (int64_t i = 0; i < height; i++) to[WIDTH * 4 + i * WIDTH + c] = (char)w[feature * k + from + i];
            }
            to += WIDTH * 4 + height * WIDTH;
        }
    }
}
