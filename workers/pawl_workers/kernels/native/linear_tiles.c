/* Linear layers in the matrix tiles of AMX: 16 rows of 32 bfloat16 times 32 x 16, sums in fp32.

   A float is the sum of three bfloat16, its upper 8 bits, the next 8 and the last 8. So x W^T is the sum of three
   products of bfloat16, each exact before it is added up; what is lost is the rounding of sums, as in fp32, and numbers
   below 2^-126. Weights are those that bfloat16 holds exactly: as they are packed, coded (coded.h), or bytes, widened.

   Every output is a sum over k in order, 32 at a time, the upper part of x before the next: its bits depend neither on
   the number of rows nor on that of threads. They differ from those of linear.c in the last places.

   Source: Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype for Higher-Precision
   Computations", 2019. */
#include "linear_tiles.h"

#include <omp.h>
#include <stddef.h>

#if !defined(__AMX_BF16__)

void tiles_part(const Linear *l, int64_t *next, int32_t threads, char *scratch) {
    (void)l, (void)next, (void)threads, (void)scratch;
}

int64_t tiles_scratch_bytes(int64_t k) { return (void)k, 0; }

#else

#include "panels.h"
#include "sums.h"
#include "tiles.h"
#include "vector.h"

#define WEIGHTS 4              /* the tile of weights, after those of sums and before those of parts */
#define MOST_DEPTH 6           /* tiles of k at a time: so many of PANELS, and a row's parts, fit the first-level cache */
#define AHEAD 2048             /* bytes of each panel to prefetch ahead, for one tile of rows */
#define FAR_AHEAD 4096         /* as many into the second-level cache */
#define KEPT 7                 /* mask of places for unpacked tiles: of MOST_DEPTH at least */
#define PAIRED_ROWS 192        /* from here on two tiles of rows are multiplied at once, with two panels */
#define PAIRED_DEPTH 18        /* tiles of k at a time then */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

int64_t tiles_scratch_bytes(int64_t k) { return scratch_bytes(k); }

/* What to prefetch along with tile i of each panel: from `near` + i packed tiles on, and from tile `turn` on, from `far`. */
typedef struct {
    const char *near[PANELS], *far[PANELS];
    int64_t turn;
} Ahead;

/* Of one tile of rows, which reads each panel once: so many bytes ahead. */
INLINE Ahead look_ahead(const Weights *w, int panels, int64_t depth, int64_t bytes) {
    Ahead ahead = {.turn = depth > bytes / w->bytes ? depth - bytes / w->bytes : 0};
    for (int p = 0; p < panels; p++) {
        ahead.near[p] = w->packed[p] + bytes;
        ahead.far[p] = w->packed[p] + w->step - ahead.turn * w->bytes;
    }
    return ahead;
}

/* sums [16][panels][16] += 16 rows times the tiles from `begin` to `end` of some panels. All parts of the rows are held, so
   that a tile of weights is loaded once for its three products. unpack: the format of panels of which a tile is unpacked
   while the one before it is multiplied, or BRAIN where none is. mask: of the places of unpacked tiles. later: what the
   second-level cache is to have, or NULL. */
INLINE void product(int panels, const char *parts, Weights *w, int64_t begin, int64_t end, int unpack, int64_t mask,
                    const Ahead *ahead, const Ahead *later, int64_t lines, int64_t bytes, float *sums) {
#define FIRST(p) \
    if (begin) _tile_loadd(p, sums + p * 16, panels * 64); \
    else _tile_zero(p); \
    if (unpack != BRAIN) unpack_tile(unpack, w, p, begin, mask);
#define MULTIPLY(p) \
    for (int64_t line = 0; line < lines; line++) { \
        __builtin_prefetch(next[p] + i * bytes + line * 64); \
        if (later) __builtin_prefetch(after[p] + i * bytes + line * 64, 0, 2); \
    } \
    if (unpack != BRAIN && i + 1 < end) unpack_tile(unpack, w, p, i + 1, mask); \
    _tile_loadd(WEIGHTS, w->tiles[p] + (i & mask) * TILE_BYTES, 64); \
    _tile_dpbf16ps(p, 5, WEIGHTS); \
    _tile_dpbf16ps(p, 6, WEIGHTS); \
    _tile_dpbf16ps(p, 7, WEIGHTS);
#define STORE(p) _tile_stored(p, sums + p * 16, panels * 64);
#define EACH_PANEL(DO) DO(0) DO(1) if (panels > 2) { DO(2) DO(3) }
    const char *const *next = ahead->near, *const *after = later ? later->near : NULL;
    EACH_PANEL(FIRST)
    for (int64_t i = begin; i < end; i++, parts += PARTS * TILE_BYTES) {
        if (i == ahead->turn) next = ahead->far;
        if (later && i == later->turn) after = later->far;
        settle(parts);
        _tile_loadd(5, parts, 64);
        _tile_loadd(6, parts + TILE_BYTES, 64);
        _tile_loadd(7, parts + 2 * TILE_BYTES, 64);
        EACH_PANEL(MULTIPLY)
    }
    EACH_PANEL(STORE)
}

/* As `product`, of two tiles of rows and two panels. The second tile of rows lies `row_step` bytes on, its sums behind
   those of the first. share: of what comes next, for each tile of k. */
INLINE void paired_product(const char *parts, int64_t row_step, Weights *w, int64_t begin, int64_t end, int unpack,
                           const char *next, int64_t share, float *sums) {
    float *below = sums + TILE_ROWS * 2 * WIDTH;
#define EACH_SUM(DO) DO(0, sums) DO(1, sums + WIDTH) DO(2, below) DO(3, below + WIDTH)
#define BEGIN_PAIRED(i, at) if (begin) _tile_loadd(i, at, 128); else _tile_zero(i);
#define STORE_PAIRED(i, at) _tile_stored(i, at, 128);
    EACH_SUM(BEGIN_PAIRED)
#define UNPACK_PAIR(i) if (unpack != BRAIN) unpack_tile(unpack, w, 0, i, -1), unpack_tile(unpack, w, 1, i, -1)
    UNPACK_PAIR(begin);
    for (int64_t i = begin; i < end; i++, next += share) {
        if (i + 1 < end) UNPACK_PAIR(i + 1);
        settle(parts);
        _tile_loadd(6, w->tiles[0] + i * TILE_BYTES, 64);
        _tile_loadd(7, w->tiles[1] + i * TILE_BYTES, 64);
        for (int part = 0; part < PARTS; part++, parts += TILE_BYTES) {
            _tile_loadd(4, parts, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, parts + row_step, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        for (int64_t at = 0; at < share; at += 64) __builtin_prefetch(next + at);
    }
    EACH_SUM(STORE_PAIRED)
}

/* As `some_panels`, of two panels and many rows. */
INLINE void paired_panels(int format, const Linear *l, int64_t row, int64_t rows, int64_t panel, const TileScratch *s) {
    int64_t depth = depth_tiles(l->k), tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, begin = 0;
    int64_t passes = (depth + PAIRED_DEPTH - 1) / PAIRED_DEPTH, row_step = depth * PARTS * TILE_BYTES;
    Weights w = find_weights(format, l, 2, panel, s);
    int64_t odd = w.packed[1] - w.packed[0], share = (2 * w.bytes / (tiles / 2) + 63) / 64 * 64;
    const Ahead nothing = {.turn = -1};
    for (int64_t pass = 0; pass < passes; pass++) {
        int64_t end = begin + depth / passes + (pass < depth % passes), bytes = (end - begin) * w.bytes;
        const char *after = w.packed[0] + (pass + 1 < passes ? end * w.bytes : w.step);
        for (int64_t tile = 0; tile < tiles; tile += 2) {
            const char *parts = s->parts + (tile * depth + begin) * PARTS * TILE_BYTES;
            float *sums = s->sums + tile * TILE_ROWS * 2 * WIDTH;
            int64_t fetched = tile / 2 * share * (end - begin); /* of the even panel, then of the odd one */
            const char *next = after + (fetched < bytes ? fetched : odd + fetched - bytes);
            if (tile == 0) paired_product(parts, row_step, &w, begin, end, format, next, share, sums);
            else if (tile + 1 < tiles) paired_product(parts, row_step, &w, begin, end, BRAIN, next, share, sums);
            else product(2, parts, &w, begin, end, BRAIN, -1, &nothing, NULL, 0, 0, sums);
        }
        begin = end;
    }
    store_tile(l, (int)rows, 2, row, panel, (const vw *)s->sums);
}

/* Some panels times the rows whose parts are in the scratch. after: the panels that come next. */
INLINE void some_panels(int format, const Linear *l, int panels, int64_t row, int64_t rows, int64_t panel, int64_t after,
                        const TileScratch *s) {
    int64_t depth = depth_tiles(l->k), row_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    int64_t passes = row_tiles == 1 ? 1 : (depth + MOST_DEPTH - 1) / MOST_DEPTH, begin = 0;
    Weights w = find_weights(format, l, panels, panel, s);
    w.step = w.step / (panels / 2) * ((after - panel) / 2);
    Ahead ahead = {.turn = -1}, later = ahead;
    if (row_tiles == 1)
        ahead = look_ahead(&w, panels, depth, AHEAD), later = look_ahead(&w, panels, depth, FAR_AHEAD);
    const int64_t size = tile_bytes(format), lines = size / 64 / row_tiles, all = size / 64;
    const int64_t pair = format == BRAIN ? -1 : 1, kept = format == BRAIN ? -1 : KEPT;
    for (int64_t pass = 0; pass < passes; pass++) {
        int64_t end = begin + depth / passes + (pass < depth % passes);
        int64_t next = pass + 1 < passes ? (end - begin) * size : w.step - begin * size;
        for (int p = 0; row_tiles > 1 && p < panels; p++) ahead.near[p] = w.packed[p] + next;
        for (int64_t tile = 0; tile < row_tiles; tile++) {
            const char *parts = s->parts + (tile * depth + begin) * PARTS * TILE_BYTES;
            float *sums = s->sums + tile * TILE_ROWS * panels * WIDTH;
            const Ahead *far = format == BYTE ? NULL : &later;
            if (row_tiles == 1) product(panels, parts, &w, begin, end, format, pair, &ahead, far, all, size, sums);
            else if (tile == 0) product(panels, parts, &w, begin, end, format, kept, &ahead, NULL, lines, size, sums);
            else product(panels, parts, &w, begin, end, BRAIN, kept, &ahead, NULL, lines, size, sums);
            for (int p = 0; p < panels; p++) ahead.near[p] += lines * 64; /* another share for each tile of rows */
            if (pass + 1 < passes) continue;
            int64_t height = rows - tile * TILE_ROWS < TILE_ROWS ? rows - tile * TILE_ROWS : TILE_ROWS;
            store_tile(l, (int)height, panels, row + tile * TILE_ROWS, panel, (const vw *)sums);
        }
        begin = end;
    }
}

/* A function for each format and number of panels. */
typedef void Panelwise(const Linear *l, int64_t row, int64_t rows, int64_t panel, int64_t after, const TileScratch *s);

#define DEFINE(format) \
    static void two_##format(const Linear *l, int64_t row, int64_t rows, int64_t panel, int64_t after, \
                             const TileScratch *s) { \
        some_panels(format, l, 2, row, rows, panel, after, s); \
    } \
    static void four_##format(const Linear *l, int64_t row, int64_t rows, int64_t panel, int64_t after, \
                              const TileScratch *s) { \
        some_panels(format, l, PANELS, row, rows, panel, after, s); \
    } \
    static void paired_##format(const Linear *l, int64_t row, int64_t rows, int64_t panel, int64_t after, \
                                const TileScratch *s) { \
        (void)after; \
        paired_panels(format, l, row, rows, panel, s); \
    }
DEFINE(BRAIN)
DEFINE(BYTE)
DEFINE(CODED)
static Panelwise *const TWO[] = {[BRAIN] = two_BRAIN, [BYTE] = two_BYTE, [CODED] = two_CODED};
static Panelwise *const FOUR[] = {[BRAIN] = four_BRAIN, [BYTE] = four_BYTE, [CODED] = four_CODED};
static Panelwise *const PAIRED[] = {[BRAIN] = paired_BRAIN, [BYTE] = paired_BYTE, [CODED] = paired_CODED};

/* One tile of rows at most, which waits for weights and not for products. */
static void few_rows_part(const Linear *l, int64_t *next, int32_t threads, const TileScratch *s) {
    int64_t panels = panels_in(l->n);
    int odd = omp_get_thread_num() & 1, known = threads <= 2, split = 0;
    for (Share share; share = take_panels(next, panels, threads, odd), share.first < share.end;) {
        if (!split) split_rows(l, 0, l->m, s->parts);
        split = 1;
        while (share.first < share.end) {
            int64_t step = share.end - share.first < PANELS ? 2 : PANELS, first = share.first, after;
            if (odd) first = share.end -= step, after = first - step;
            else after = share.first += step;
            if (after < 0 || after >= panels || (share.first == share.end && !known)) after = first;
            (step == 2 ? TWO : FOUR)[l->format](l, 0, l->m, first, after, s);
        }
    }
}

/* How blocks of rows are dealt out. One of the first `whole` is an item, so that one thread alone splits it; of the others
   the panels are, so that threads end together. */
typedef struct {
    Deal dealt;
    int64_t height, whole, items; /* height: rows of a block */
} Blocks;

INLINE Blocks deal_blocks(const Linear *l, int32_t threads) {
    Blocks b = {.dealt = deal_panels(l->n, threads), .height = most_row_tiles(l->k) * TILE_ROWS};
    int64_t blocks = (l->m + b.height - 1) / b.height, rounds = (l->m / b.height - 1) / threads;
    if (rounds > 0 && b.height >= TALL * TILE_ROWS) b.whole = rounds * threads;
    b.items = b.whole + (blocks - b.whole) * b.dealt.items;
    return b;
}

void tiles_part(const Linear *l, int64_t *next, int32_t threads, char *scratch) {
    TileScratch s = scratch_of(scratch, l->k);
    TileConfig config = {.palette = 1};
    if (l->m < 1) return;
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = TILE_ROWS;
    for (int i = 0; i < 8 && l->m < TILE_ROWS; i++) config.rows[i] = i == WEIGHTS ? TILE_ROWS : (uint8_t)l->m;
    settle(&config);
    _tile_loadconfig(&config);
    if (l->m <= TILE_ROWS) {
        few_rows_part(l, next, threads, &s);
        _tile_release();
        return;
    }
    Blocks blocks = deal_blocks(l, threads);
    int64_t held = -1;
    for (int64_t item; (item = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < blocks.items;) {
        int64_t shared = item - blocks.whole, block = shared < 0 ? item : blocks.whole + shared / blocks.dealt.items;
        int64_t row = block * blocks.height, count = l->m - row < blocks.height ? l->m - row : blocks.height;
        if (block != held) split_rows(l, row, count, s.parts);
        held = block;
        int64_t i = shared % blocks.dealt.items;
        int64_t first = shared < 0 ? 0 : first_of(&blocks.dealt, i);
        int64_t end = shared < 0 ? blocks.dealt.panels : end_of(&blocks.dealt, i);
        int paired = l->m >= PAIRED_ROWS && count > PAIRED_ROWS / 2;
        for (; paired && first < end; first += 2) PAIRED[l->format](l, row, count, first, first + 2, &s);
        for (; first + PANELS <= end; first += PANELS) FOUR[l->format](l, row, count, first, first + PANELS, &s);
        if (first < end) TWO[l->format](l, row, count, first, first + 2, &s);
    }
    _tile_release();
}

#endif
