/* Linear layers in the matrix tiles of AMX: 16 rows of 32 bfloat16 times 32 x 16, sums in fp32.

   A float is the sum of three bfloat16, its upper 8 bits, the next 8 and the last 8. So x W^T is the sum of three
   products of bfloat16, each exact before it is added up; what is lost is the rounding of sums, as in fp32, and numbers
   below 2^-126. Weights are those that bfloat16 holds exactly: as they are packed, or bytes, widened.

   Every output is a sum over k in order, 32 at a time, the upper part of x before the next: its bits depend neither on
   the number of rows nor on that of threads. They differ from those of linear.c in the last places.

   Source: Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype for Higher-Precision
   Computations", 2019. */
#include "linear_tiles.h"

#include <stddef.h>

#if !defined(__AMX_BF16__)

void tiles_part(const Linear *l, int64_t *next, int32_t threads, char *scratch) {
    (void)l, (void)next, (void)threads, (void)scratch;
}

int64_t tiles_scratch_bytes(int64_t k) { return (void)k, 0; }

#else

#include "panels.h"
#include "sums.h"
#include "vector.h"

#define TILE_ROWS 16
#define TILE_DEPTH 32   /* k of a tile */
#define TILE_BYTES 1024 /* 16 x 32 bfloat16, or 16 x 16 floats */
#define PARTS 3
#define PANELS 4               /* at once */
#define SPLIT_BYTES (1 << 20)  /* of a block of rows that are split: they stay in the second-level cache */
#define MOST_ROW_TILES 8       /* of such a block */
#define MOST_DEPTH 6           /* tiles of k at a time: so many of PANELS, and a row's parts, fit the first-level cache */
#define AHEAD 2048             /* bytes to prefetch ahead, for one tile of rows */
#define PAIRED_ROWS 192        /* from here on two tiles of rows are multiplied at once, with two panels */
#define PAIRED_DEPTH 18        /* tiles of k at a time then */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

typedef struct {
    char *parts;         /* [row tiles][k tiles][PARTS][16][32] bfloat16 */
    char *widened;       /* panels of bytes as bfloat16; a panel of which a last tile is filled up with zeros */
    float *sums;         /* [row tiles][16][panels][16] */
} TileScratch;

INLINE int64_t depth_tiles(int64_t k) { return (k + TILE_DEPTH - 1) / TILE_DEPTH; }

/* Tiles of rows that are split at a time. */
INLINE int64_t most_row_tiles(int64_t k) {
    int64_t tiles = SPLIT_BYTES / (depth_tiles(k) * PARTS * TILE_BYTES);
    return tiles < 1 ? 1 : tiles > MOST_ROW_TILES ? MOST_ROW_TILES : tiles;
}

/* Grows with k, whatever the number of rows. */
INLINE int64_t parts_bytes(int64_t k) {
    int64_t least = PARTS * depth_tiles(k) * TILE_BYTES;
    return least > SPLIT_BYTES ? least : SPLIT_BYTES;
}

int64_t tiles_scratch_bytes(int64_t k) {
    return parts_bytes(k) + PANELS * (depth_tiles(k) + MOST_ROW_TILES) * TILE_BYTES;
}

static TileScratch scratch_of(char *memory, int64_t k) {
    char *widened = memory + parts_bytes(k);
    return (TileScratch){memory, widened, (float *)(widened + PANELS * depth_tiles(k) * TILE_BYTES)};
}

/* The upper 16 bits of 32 floats. */
INLINE __m512i upper_halves(__m512i low, __m512i high) {
    static const uint16_t odd[TILE_DEPTH] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                             33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_permutex2var_epi16(low, _mm512_loadu_si512(odd), high);
}

INLINE __m512 upper_part(__m512 x) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32((int32_t)0xffff0000)));
}

/* 32 floats into a row of each of three tiles. */
INLINE void split_floats(__m512 low, __m512 high, char *to) {
    for (int part = 0; part < PARTS; part++, to += TILE_BYTES) {
        _mm512_store_si512(to, upper_halves(_mm512_castps_si512(low), _mm512_castps_si512(high)));
        low = _mm512_sub_ps(low, upper_part(low));
        high = _mm512_sub_ps(high, upper_part(high));
    }
}

/* Rows of x into tiles of their parts, tile by tile: row by row, the lines that are written would lie 1 KiB apart, and
   share a few sets of the first-level cache. Rows that the last tile lacks are left as they were: no other row sees them. */
static void split_rows(const Linear *l, int64_t row, int64_t rows, char *parts) {
    int64_t tiles = depth_tiles(l->k), rest = l->k % TILE_DEPTH;
    for (int64_t first = 0; first < rows; first += TILE_ROWS) {
        int64_t height = rows - first < TILE_ROWS ? rows - first : TILE_ROWS;
        for (int64_t tile = 0; tile < tiles; tile++, parts += PARTS * TILE_BYTES) {
            const float *x = l->x + (row + first) * l->x_stride + tile * TILE_DEPTH;
            for (int64_t r = 0; r < height; r++, x += l->x_stride) {
                float filled[TILE_DEPTH] = {0};
                const float *from = x;
                if (rest && tile + 1 == tiles) from = memcpy(filled, x, (size_t)rest * sizeof(float));
                split_floats(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16), parts + r * 64);
            }
        }
    }
}

/* A panel of bytes as one of bfloat16. */
static void widen(const int8_t *panel, int64_t k, char *to) {
    const __m512i upper = _mm512_set1_epi32((int32_t)0xffff0000);
    for (int64_t i = 0; i < k; i += 2, to += 64) {
        __m512i even = (__m512i)bytew(panel + i * WIDTH), odd = _mm512_setzero_si512();
        if (i + 1 < k) odd = (__m512i)bytew(panel + (i + 1) * WIDTH);
        _mm512_store_si512(to, _mm512_or_si512(_mm512_srli_epi32(even, 16), _mm512_and_si512(odd, upper)));
    }
}

/* Where the weights of some panels lie as tiles, the last of each filled up; how many bytes further the next ones do. */
INLINE int64_t find_tiles(const Linear *l, int panels, int64_t panel, const TileScratch *s, const char **found) {
    int64_t bytes = panel_bytes(l->format, l->k), depth = depth_tiles(l->k), whole = l->k / TILE_DEPTH;
    Panels at = panels_of(l, bytes);
    const char *from = (const char *)l->weights + panel / 2 * at.pair_step;
    for (int p = 0; p < panels; p++) {
        char *own = s->widened + p * depth * TILE_BYTES;
        found[p] = from + (p & 1) * at.odd_step + (p >> 1) * at.pair_step;
        if (l->format != BYTE && whole == depth) continue;
        if (whole < depth) memset(own + whole * TILE_BYTES, 0, TILE_BYTES);
        if (l->format == BYTE) widen((const int8_t *)found[p], l->k, own);
        else memcpy(own, found[p], (size_t)bytes);
        found[p] = own;
    }
    return panels / 2 * at.pair_step;
}

/* What to prefetch along with tile i of each panel: from `near` + i tiles on, and after `turn` bytes from `far`. */
typedef struct {
    const char *near[PANELS], *far[PANELS];
    int64_t turn, lines; /* lines of each tile */
} Ahead;

/* sums [16][panels][16] += 16 rows times some tiles of some panels. */
INLINE void product(int panels, const char *parts, const char *const *weights, int64_t depth, const Ahead *ahead,
                    int64_t lines, float *sums, int begin) {
/* Prefetches lie between the products, a third with each part: many at once would hold up the loads. */
#define PREFETCH(p) \
    for (int64_t i = part * lines / PARTS; i < (part + 1) * lines / PARTS; i++) __builtin_prefetch(next[p] + at + i * 64);
#define MULTIPLY(p) PREFETCH(p) _tile_loadd(5, weights[p] + at, 64); _tile_dpbf16ps(p, 4, 5);
#define BEGIN(p) if (begin) _tile_zero(p); else _tile_loadd(p, sums + p * 16, panels * 64);
#define STORE(p) _tile_stored(p, sums + p * 16, panels * 64);
#define EACH_PANEL(DO) DO(0) DO(1) if (panels > 2) { DO(2) DO(3) }
    const char *const *next = ahead->near;
    EACH_PANEL(BEGIN)
    for (int64_t at = 0; at < depth * TILE_BYTES; at += TILE_BYTES, parts += PARTS * TILE_BYTES) {
        if (at == ahead->turn) next = ahead->far;
        for (int part = 0; part < PARTS; part++) {
            _tile_loadd(4, parts + part * TILE_BYTES, 64);
            EACH_PANEL(MULTIPLY)
        }
    }
    EACH_PANEL(STORE)
}

/* As `product`, of two tiles of rows and two panels: 8 tiles are loaded for 12 products, and not 15. The second tile of
   rows lies `row_step` bytes on, its sums behind those of the first. share: of what comes next, for each tile of k. */
INLINE void paired_product(const char *parts, int64_t row_step, const char *const *weights, int64_t depth,
                           const char *next, int64_t share, float *sums, int begin) {
    float *below = sums + TILE_ROWS * 2 * WIDTH;
#define EACH_SUM(DO) DO(0, sums) DO(1, sums + WIDTH) DO(2, below) DO(3, below + WIDTH)
#define BEGIN_PAIRED(i, at) if (begin) _tile_zero(i); else _tile_loadd(i, at, 128);
#define STORE_PAIRED(i, at) _tile_stored(i, at, 128);
    EACH_SUM(BEGIN_PAIRED)
    for (int64_t at = 0; at < depth * TILE_BYTES; at += TILE_BYTES, next += share) {
        _tile_loadd(6, weights[0] + at, 64);
        _tile_loadd(7, weights[1] + at, 64);
        for (int part = 0; part < PARTS; part++, parts += TILE_BYTES) {
            _tile_loadd(4, parts, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, parts + row_step, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(next + i);
    }
    EACH_SUM(STORE_PAIRED)
}

/* As `some_panels`, of two panels and many rows. */
static void paired_panels(const Linear *l, int64_t row, int64_t rows, int64_t panel, const TileScratch *s) {
    const char *weights[PANELS];
    int64_t depth = depth_tiles(l->k), tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, begin = 0;
    int64_t passes = (depth + PAIRED_DEPTH - 1) / PAIRED_DEPTH, step = find_tiles(l, 2, panel, s, weights);
    int64_t odd = weights[1] - weights[0], share = (2 * TILE_BYTES / (tiles / 2) + 63) / 64 * 64;
    const Ahead nothing = {{weights[0], weights[1]}, {NULL}, -1, 0};
    for (int64_t pass = 0; pass < passes; pass++) {
        int64_t size = depth / passes + (pass < depth % passes), bytes = size * TILE_BYTES;
        const char *after = weights[0] + (pass + 1 < passes ? bytes : step - begin * TILE_BYTES);
        for (int64_t tile = 0; tile < tiles; tile += 2) {
            const char *parts = s->parts + (tile * depth + begin) * PARTS * TILE_BYTES;
            float *sums = s->sums + tile * TILE_ROWS * 2 * WIDTH;
            int64_t fetched = tile / 2 * share * size; /* of the even panel, then of the odd one */
            const char *next = after + (fetched < bytes ? fetched : odd + fetched - bytes);
            if (tile + 1 == tiles) product(2, parts, weights, size, &nothing, 0, sums, pass == 0);
            else paired_product(parts, depth * PARTS * TILE_BYTES, weights, size, next, share, sums, pass == 0);
        }
        weights[0] += bytes, weights[1] += bytes;
        begin += size;
    }
    store_tile(l, (int)rows, 2, row, panel, (const vw *)s->sums);
}

/* Some panels times the rows whose parts are in the scratch. */
INLINE void some_panels(const Linear *l, int panels, int64_t row, int64_t rows, int64_t panel, const TileScratch *s) {
    const char *weights[PANELS];
    int64_t depth = depth_tiles(l->k), row_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, begin = 0;
    int64_t passes = row_tiles == 1 ? 1 : (depth + MOST_DEPTH - 1) / MOST_DEPTH;
    int64_t step = find_tiles(l, panels, panel, s, weights);
    Ahead ahead = {.turn = row_tiles > 1 ? -1 : depth * TILE_BYTES - AHEAD, .lines = TILE_ROWS / row_tiles};
    for (int64_t pass = 0; pass < passes; pass++) {
        int64_t size = depth / passes + (pass < depth % passes), bytes = size * TILE_BYTES;
        for (int p = 0; p < panels; p++) {
            const char *after = weights[p] + (pass + 1 < passes ? bytes : step - begin * TILE_BYTES);
            ahead.near[p] = row_tiles == 1 ? weights[p] + AHEAD : after;
            ahead.far[p] = after - ahead.turn;
        }
        for (int64_t tile = 0; tile < row_tiles; tile++) {
            const char *parts = s->parts + (tile * depth + begin) * PARTS * TILE_BYTES;
            float *sums = s->sums + tile * TILE_ROWS * panels * WIDTH;
            if (row_tiles == 1) product(panels, parts, weights, size, &ahead, TILE_ROWS, sums, 1);
            else product(panels, parts, weights, size, &ahead, ahead.lines, sums, pass == 0);
            for (int p = 0; p < panels; p++) ahead.near[p] += ahead.lines * 64; /* another share for each tile of rows */
            if (pass + 1 < passes) continue;
            int64_t height = rows - tile * TILE_ROWS < TILE_ROWS ? rows - tile * TILE_ROWS : TILE_ROWS;
            store_tile(l, (int)height, panels, row + tile * TILE_ROWS, panel, (const vw *)sums);
        }
        for (int p = 0; p < panels; p++) weights[p] += bytes;
        begin += size;
    }
}

void tiles_part(const Linear *l, int64_t *next, int32_t threads, char *scratch) {
    TileScratch s = scratch_of(scratch, l->k);
    TileConfig config = {.palette = 1};
    if (l->m < 1) return;
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = TILE_ROWS;
    for (int i = 0; i <= PANELS && l->m < TILE_ROWS; i++) config.rows[i] = (uint8_t)l->m; /* of sums and of x */
    _tile_loadconfig(&config);
    Deal dealt = deal_panels(l->n, threads);
    int64_t rows = most_row_tiles(l->k) * TILE_ROWS, blocks = (l->m + rows - 1) / rows, held = -1;
    for (int64_t item; (item = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < blocks * dealt.items;) {
        int64_t block = item / dealt.items, i = item % dealt.items;
        int64_t row = block * rows, count = l->m - row < rows ? l->m - row : rows;
        if (block != held) split_rows(l, row, count, s.parts);
        held = block;
        int64_t first = first_of(&dealt, i), end = end_of(&dealt, i);
        int paired = l->m >= PAIRED_ROWS && count > PAIRED_ROWS / 2;
        for (; paired && first < end; first += 2) paired_panels(l, row, count, first, &s);
        for (; first + PANELS <= end; first += PANELS) some_panels(l, PANELS, row, count, first, &s);
        if (first < end) some_panels(l, 2, row, count, first, &s);
    }
    _tile_release();
}

#endif
