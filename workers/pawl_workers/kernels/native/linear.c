/* Linear layers over weights packed once: y = x W^T + b.

   Packed: panels of as many output features as a register holds, [panels][K][WIDTH], an even number of them, so that the
   inner loop reads a few streams; in fp32, in fp16 or bf16, which are widened exactly, or in bytes with a scale per
   feature, or per feature and group of K. Panels of bf16 are [ceil(K / 2)][WIDTH][2]: two values of k side by side are
   widened by a shift and a mask. Panels of groups hold, for each group, WIDTH scales and [group][WIDTH] bytes: a byte
   times its scale is a weight, rounded to fp32.

   Where there are many rows, the first tile keeps what it widened for those after it, unless to widen it again is faster.
   While a panel is multiplied, the next one is fetched.

   Every output is a sum over k in order, started at 0, scaled (where a feature has one scale) and with the bias added
   last: its bits depend neither on the number of rows nor on that of threads, which share the panels out, nor on the
   width of registers. */
#include "linear.h"

#include <omp.h>
#include <stddef.h>

#include "linear_tiles.h"
#include "panels.h"
#include "sums.h"
#include "vector.h"

#define ROW_BLOCK 96 /* rows that stay in the second-level cache while a thread passes over its panels */
#define LAST_ROWS 48 /* of a block that is dealt out at the end of a prompt's layer, at most */
#define AHEAD 2048   /* bytes of each of four panels and more to prefetch ahead, where weights are read once */
#define FEW_AHEAD 4096 /* of each of two, which have less under way */
#define MOST_PANELS 8
#define MOST_SUMS 24
#define DEPTH 4      /* inputs whose weights are prefetched together */
#define WIDE 6       /* a format of its own: two panels of floats side by side, [K][2][WIDTH] */

#if WIDTH == 16
#define ROWS 12      /* 12 rows x 2 panels fill 24 of 32 registers */
#define MANY_ROWS 6  /* up to here tiles of many panels are there */
#define KEEP_ROWS 25 /* from here on weights are widened once, and not in each tile; then tiles have over MANY_ROWS */
#else
#define ROWS 6 /* 6 rows x 2 panels fill 12 of 16 registers */
#define MANY_ROWS 3
#define KEEP_ROWS 8
#endif

/* The weights of k of one panel. odd: whether k is; scale: of k's group, whose bytes lie behind the scales of all groups
   up to it: `panel` is moved on by those. */
INLINE vw weights_at(int format, int odd, vw scale, const char *panel, int64_t k) {
    switch (format) {
        case GROUPS: return bytew((const int8_t *)panel + k * WIDTH) * scale;
        case FLOAT: return loadw((const float *)panel + k * WIDTH);
        case WIDE: return loadw((const float *)panel + k * 2 * WIDTH);
        case HALF: return halfw((const uint16_t *)panel + k * WIDTH);
        case BYTE: return bytew((const int8_t *)panel + k * WIDTH);
        default: {
            const uint32_t *pair = (const uint32_t *)panel + (k >> 1) * WIDTH;
            return odd ? odd_brainw(pair) : even_brainw(pair);
        }
    }
}

/* sums += x[k] * weights[k] for one k. bases: every third row of x; the two after it lie `stride` bytes on. wide: if not
   NULL, where the weights of k of two panels are kept as floats. */
INLINE void add_products(int format, int odd, int rows, int panels, const char *const *bases, int64_t stride,
                         const char *const *packed, const vw *scales, int64_t k, float *wide, vw *sums) {
    vw weights[MOST_PANELS];
    for (int p = 0; p < panels; p++) weights[p] = weights_at(format, odd, scales[p], packed[p], k);
    for (int p = 0; wide && p < panels; p++) storew(wide + (k * 2 + p) * WIDTH, weights[p]);
    for (int r = 0; r < rows; r++) {
        vw value = allw(*(const float *)(bases[r / 3] + (r % 3) * stride + k * 4));
        for (int p = 0; p < panels; p++) sums[r * panels + p] = fmaw(value, weights[p], sums[r * panels + p]);
    }
}

/* What to prefetch of each panel with every DEPTH inputs: `step` bytes, from `near` on, and from input `turn` on, `jump`
   bytes later; and, where rows take several tiles, one of the `other` lines, if there are any. */
typedef struct {
    const char *near;
    int64_t step, turn, jump;
    Lines other;
} Ahead;

/* Lines that DEPTH inputs of a panel take. */
INLINE int lines_of(int format) {
    int bytes = format == FLOAT ? 4 : format == WIDE || format == HALF || format == BRAIN ? 2 : 1;
    return (DEPTH * WIDTH * bytes + 63) / 64;
}

/* Where panel p of a tile begins. */
INLINE const char *place_of(const Panels *at, const char *first, int p) {
    return first + (p & 1) * at->odd_step + (p >> 1) * at->pair_step;
}

/* Where a tile puts what two panels give lies in no first-level cache: of prompts it was too far back, and what decodes
   write again, the other threads have read since. Stores that wait for it hold up the tiles after this one: so it is on
   its way while the products are summed. By the builtin: with inline assembly GCC keeps a tile's sums in memory. */
INLINE void fetch_results(const Linear *l, int rows, int64_t row, int64_t panel) {
    const float *y = l->y + row * l->y_stride + (l->gated ? panel / 2 : panel) * WIDTH;
    for (int r = 0; r < rows; r++, y += l->y_stride) {
        __builtin_prefetch(y, 1, 3);
        if (!l->gated) __builtin_prefetch(y + WIDTH, 1, 3);
    }
}

/* Some rows times some panels. first: where the panel of that number lies, or two of them as floats. wide: where two
   are kept as floats, or NULL. */
INLINE void tile(const Panels *at, int format, int rows, int panels, int64_t row, int64_t panel, const char *first,
                 Ahead ahead, float *wide) {
    const Linear *l = at->linear;
    vw sums[MOST_SUMS], scales[MOST_PANELS];
    const char *bases[(ROWS + 2) / 3], *packed[MOST_PANELS];
    int64_t stride = l->x_stride * 4, k = l->k, group = format == GROUPS ? 1 << l->shift : k, i = 0;
    int line_by_line = rows > MANY_ROWS && ahead.step <= 64; /* a tile's share, where many tiles share the fetching */
    for (int b = 0; b * 3 < rows; b++) bases[b] = (const char *)(l->x + (row + b * 3) * l->x_stride);
    for (int p = 0; p < panels; p++) packed[p] = format == WIDE ? first + p * WIDTH * 4 : place_of(at, first, p);
    for (int p = 0; p < panels; p++) scales[p] = allw(1.0f);
    for (int s = 0; s < rows * panels; s++) sums[s] = allw(0.0f);
    if (rows > MANY_ROWS) fetch_results(l, rows, row, panel);
    while (i < k) {
        int64_t end = k - i < group ? k : i + group;
        for (int p = 0; format == GROUPS && p < panels; p++) {
            scales[p] = loadw((const float *)(packed[p] + i * WIDTH));
            packed[p] += WIDTH * 4;
        }
        for (; i + DEPTH <= end; i += DEPTH) {
            if (i == ahead.turn) ahead.near += ahead.jump;
            for (int p = 0; p < panels; p++)
                for (int line = 0; line < lines_of(format); line++)
                    if (line == 0 || !line_by_line) __builtin_prefetch(place_of(at, ahead.near, p) + line * 64);
            ahead.near += ahead.step;
            if (rows >= MANY_ROWS && panels == 2 && ahead.other.step) { /* as tiles are of which there are several */
                __builtin_prefetch(ahead.other.at, 0, 2);
                ahead.other.at += ahead.other.step;
            }
#pragma GCC unroll 4
            for (int j = 0; j < DEPTH; j++)
                add_products(format, j & 1, rows, panels, bases, stride, packed, scales, i + j, wide, sums);
        }
        for (; i < end; i++) add_products(format, i & 1, rows, panels, bases, stride, packed, scales, i, wide, sums);
    }
    store_tile(l, rows, panels, row, panel, sums);
}

/* A function for each number of rows: for many panels (the fewer the rows, the more), for two, and for two that are kept
   as floats for further tiles. */
typedef void Tile(const Panels *at, int64_t row, int64_t panel, const char *first, Ahead ahead, float *wide);

#define DEFINE(name, format, rows, panels, kept)                                                                   \
    static void name(const Panels *at, int64_t row, int64_t panel, const char *first, Ahead ahead, float *wide) {  \
        tile(at, format, rows, panels, row, panel, first, ahead, kept ? wide : NULL);                           \
    }
#define TILE(format, rows, panels) DEFINE(tile_##format##_##rows##_##panels, format, rows, panels, 0)
#define KEPT(format, rows, panels) DEFINE(kept_##format##_##rows##_##panels, format, rows, panels, 1)
#define NAME(format, rows, panels) tile_##format##_##rows##_##panels,
#define KEPT_NAME(format, rows, panels) kept_##format##_##rows##_##panels,
#if WIDTH == 16
#define FEW_ROWS(DO, format) \
    DO(format, 1, 2) DO(format, 2, 2) DO(format, 3, 2) DO(format, 4, 2) DO(format, 5, 2) DO(format, 6, 2)
#define MORE_ROWS(DO, format) \
    DO(format, 7, 2) DO(format, 8, 2) DO(format, 9, 2) DO(format, 10, 2) DO(format, 11, 2) DO(format, 12, 2)
#define MANY_PANELS(DO, format) \
    DO(format, 1, 8) DO(format, 2, 4) DO(format, 3, 4) DO(format, 4, 4) DO(format, 5, 4) DO(format, 6, 4)
#else
#define FEW_ROWS(DO, format) DO(format, 1, 2) DO(format, 2, 2) DO(format, 3, 2)
#define MORE_ROWS(DO, format) DO(format, 4, 2) DO(format, 5, 2) DO(format, 6, 2)
#define MANY_PANELS(DO, format) DO(format, 1, 8) DO(format, 2, 4) DO(format, 3, 4)
#endif
#define TABLES(format)                                                                                                \
    FEW_ROWS(TILE, format) MORE_ROWS(TILE, format) MANY_PANELS(TILE, format)                                          \
    static Tile *const two_##format[] = {NULL, FEW_ROWS(NAME, format) MORE_ROWS(NAME, format)};                       \
    static Tile *const many_##format[] = {NULL, MANY_PANELS(NAME, format)};
#define KEPT_TABLE(format) \
    MORE_ROWS(KEPT, format) \
    static Tile *const kept_##format[] = {MORE_ROWS(KEPT_NAME, format)}; /* from MANY_ROWS + 1 rows on */
TABLES(FLOAT)
TABLES(HALF)
TABLES(BRAIN)
TABLES(BYTE)
TABLES(GROUPS)
KEPT_TABLE(HALF)
KEPT_TABLE(BRAIN)
KEPT_TABLE(BYTE)
KEPT_TABLE(GROUPS)
MORE_ROWS(TILE, WIDE)

static Tile *const *const MANY[] = {many_FLOAT, many_HALF, many_BRAIN, many_BYTE, many_GROUPS};
static Tile *const *const TWO[] = {two_FLOAT, two_HALF, two_BRAIN, two_BYTE, two_GROUPS};
static Tile *const *const KEEP[] = {NULL, kept_HALF, kept_BRAIN, kept_BYTE, kept_GROUPS};
static Tile *const WIDENED[] = {MORE_ROWS(NAME, WIDE)};

/* On AMD's processors with AVX-512 it is faster to read 16 bits from the first-level cache, and to widen them in every tile,
   than to read floats from the second. */
INLINE int is_kept(int format, int64_t rows) {
    if (format == FLOAT || rows < KEEP_ROWS) return 0;
#if WIDTH == 16
    if ((format == BRAIN || format == HALF) && __builtin_cpu_is("amd")) return 0;
#endif
    return 1;
}

INLINE int panels_at_once(int64_t rows) { return rows == 1 ? 8 : rows <= MANY_ROWS ? 4 : 2; }

int64_t linear_tile_rows(void) { return ROWS; }

int64_t linear_wide_bytes(int64_t k) {
    int64_t wide = (k + 1) / 2 * 2 * WIDTH * 2 * (int64_t)sizeof(float), tiles = tiles_scratch_bytes(k);
    return wide > tiles ? wide : tiles;
}

/* What tile i of some rows prefetches. One tile reads its own weights a little ahead and turns to those that come after;
   of several, each fetches a share of what comes after. delta: bytes to there; bytes: of a panel. */
INLINE Ahead look_ahead(const Linear *l, const char *from, int64_t delta, int64_t bytes, int many, int64_t i,
                        int64_t tiles) {
    int64_t step = bytes * DEPTH / l->k, far = many || l->format == BYTE ? AHEAD : FEW_AHEAD;
    if (tiles > 1) return (Ahead){from + delta + i * bytes / tiles, step / tiles + 1, -1, 0, {0}};
    return (Ahead){from + far, step, bytes > far ? (bytes - far) / step * DEPTH : 0, delta - bytes, {0}};
}

/* Panels from `first` to `end`, both even, times rows from `row` to `row_end`, in tiles of nearly equal height. after:
   the panel that comes next. */
static void some_panels(const Linear *l, int64_t first, int64_t end, int64_t after, int64_t row, int64_t row_end,
                        float *wide, Fetch *fetch) {
    int64_t rows = row_end - row, tiles = (rows + ROWS - 1) / ROWS, bytes = panel_bytes(l->format, l->k);
    if (l->format == GROUPS) bytes += scale_bytes(l->shift, l->k);
    Panels at = panels_of(l, bytes);
    int64_t step = panels_at_once((rows + tiles - 1) / tiles);
    int keep = is_kept(l->format, rows);
    for (int64_t panel = first; panel < end;) {
        int many = step > 2 && end - panel >= step;
        const char *from = (const char *)l->weights + panel / 2 * at.pair_step;
        int64_t next = panel + (many ? step : 2), delta = ((next < end ? next : after) - panel) / 2 * at.pair_step;
        for (int64_t i = 0, at_row = row; i < tiles; i++) {
            int64_t height = rows / tiles + (i < rows % tiles);
            Ahead ahead = look_ahead(l, from, delta, bytes, many, i, tiles);
            ahead.other = tiles > 1 ? fetch_some(fetch, larger(l->k / DEPTH, 1), from) : (Lines){from, 0};
            if (keep && i == 0) KEEP[l->format][height - MANY_ROWS - 1](&at, at_row, panel, from, ahead, wide);
            else if (keep) WIDENED[height - MANY_ROWS - 1](&at, at_row, panel, (const char *)wide, ahead, NULL);
            else (many ? MANY : TWO)[l->format][height](&at, at_row, panel, from, ahead, NULL);
            at_row += height;
        }
        panel = next;
    }
}

/* Panels and rows, in blocks that stay in the second-level cache. after: the panel that comes next. */
static void some_rows(const Linear *l, Part part, int64_t after, float *wide, Fetch *fetch) {
    int64_t rows = part.row_end - part.row, blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    for (int64_t block = 0; block < blocks; block++) {
        int64_t row = part.row + rows * block / blocks, row_end = part.row + rows * (block + 1) / blocks;
        some_panels(l, part.first, part.end, block + 1 < blocks ? part.first : after, row, row_end, wide, fetch);
    }
}

/* A thread's share of more rows than one block. */
static void many_rows_part(const Linear *l, int64_t *next, float *wide, Fetch *fetch) {
    Halves halves = halve(l->m, l->n, ROWS, LAST_ROWS);
    int thread = omp_get_thread_num(), step = from_the_last(thread) ? -1 : 1;
    for (int64_t item; (item = take_item(next, halves.items, 0, thread)) >= 0;) {
        int64_t then = item + step < 0 || item + step == halves.items ? item : item + step;
        some_rows(l, part_of(&halves, item), part_of(&halves, then).first, wide, fetch);
    }
}

/* Takes its next panels before it computes those that it took before, so that it knows what to prefetch. */
void linear_part(const Linear *l, int64_t *next, int32_t threads, float *wide, Fetch *fetch) {
    if (in_tiles(l->format)) {
        tiles_part(l, next, threads, (char *)wide);
        return;
    }
    if (l->m > ROW_BLOCK && threads > 1) {
        many_rows_part(l, next, wide, fetch);
        return;
    }
    Deal dealt = deal_panels(l->n, threads);
    int64_t then, item = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    for (; item < dealt.items; item = then) {
        int early = item + threads < dealt.chunks; /* the last ones go to whoever is free first */
        then = early ? __atomic_fetch_add(next, 1, __ATOMIC_RELAXED) : item + threads;
        int64_t first = first_of(&dealt, item), after = then < dealt.items ? first_of(&dealt, then) : first;
        some_rows(l, (Part){first, end_of(&dealt, item), 0, l->m}, after, wide, fetch);
        if (!early) then = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    }
}

/* wide: threads times pawl_linear_wide_bytes(k). */
void pawl_linear(const Linear *linear, char *wide, int32_t threads) {
    int64_t next = 0;
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num();
        Fetch nothing = fetch_for(NULL, thread, threads);
        linear_part(linear, &next, threads, (float *)(wide + thread * linear_wide_bytes(linear->k)), &nothing);
    }
}

int64_t pawl_linear_wide_bytes(int64_t k) { return linear_wide_bytes(k); }
