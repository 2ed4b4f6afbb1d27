/* What matrix tiles multiply: rows as the parts that linear_tiles.c names, and panels of weights. */
#ifndef PAWL_TILES_H
#define PAWL_TILES_H

#include "coded.h"
#include "panels.h"
#include "vector.h"

#define TILE_ROWS 16
#define TILE_DEPTH 32         /* k of a tile */
#define TILE_BYTES 1024       /* 16 x 32 bfloat16, or 16 x 16 floats */
#define PARTS 3               /* of a float */
#define PANELS 4              /* at once */
#define SPLIT_BYTES (1 << 20) /* of a block of rows that are split: they stay in the second-level cache */
#define MOST_ROW_TILES 8      /* of such a block */
#define TALL 6                /* of blocks that a thread may have to itself */

typedef struct {
    char *parts;   /* [row tiles][k tiles][PARTS][16][32] bfloat16 */
    char *widened; /* what is unpacked of panels, as bfloat16; a panel of which a last tile is filled up with zeros */
    float *sums;   /* [row tiles][16][panels][16] */
} TileScratch;

/* What is stored before has to be in memory: GCC 12 does not see that tiles, and how they are configured, are read. */
INLINE void settle(const void *stored) { __asm__ volatile("" : : "r"(stored) : "memory"); }

INLINE int64_t depth_tiles(int64_t k) { return (k + TILE_DEPTH - 1) / TILE_DEPTH; }

/* Tiles of rows that are split at a time; many are even in number, because two are multiplied at once. */
INLINE int64_t most_row_tiles(int64_t k) {
    int64_t tiles = SPLIT_BYTES / (depth_tiles(k) * PARTS * TILE_BYTES);
    if (tiles >= TALL) tiles = tiles / 2 * 2;
    return tiles < 1 ? 1 : tiles > MOST_ROW_TILES ? MOST_ROW_TILES : tiles;
}

/* Grows with k, whatever the number of rows. */
INLINE int64_t parts_bytes(int64_t k) {
    int64_t least = PARTS * depth_tiles(k) * TILE_BYTES;
    return least > SPLIT_BYTES ? least : SPLIT_BYTES;
}

/* Bytes of a thread's scratch. */
INLINE int64_t scratch_bytes(int64_t k) {
    return parts_bytes(k) + PANELS * (depth_tiles(k) + MOST_ROW_TILES) * TILE_BYTES;
}

INLINE TileScratch scratch_of(char *memory, int64_t k) {
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

/* Of two vectors of floats, the upper halves in turn. */
INLINE __m512i halves_in_turn(vw even, vw odd) {
    __m512i low = _mm512_srli_epi32((__m512i)even, 16), upper = _mm512_set1_epi32((int32_t)0xffff0000);
    return _mm512_ternarylogic_epi32(low, (__m512i)odd, upper, 0xf8); /* low | (odd & upper) */
}

/* 32 k of a panel of bytes, or the `left` ones, as a tile of bfloat16. */
INLINE void widen_tile(const int8_t *from, int64_t left, char *to) {
    if (left >= TILE_DEPTH) {
#pragma GCC unroll 16
        for (int i = 0; i < TILE_DEPTH; i += 2, to += 64)
            _mm512_store_si512(to, halves_in_turn(bytew(from + i * WIDTH), bytew(from + (i + 1) * WIDTH)));
        return;
    }
    for (int i = 0; i < TILE_DEPTH; i += 2, to += 64) {
        vw even = i < left ? bytew(from + i * WIDTH) : allw(0.0f);
        vw odd = i + 1 < left ? bytew(from + (i + 1) * WIDTH) : allw(0.0f);
        _mm512_store_si512(to, halves_in_turn(even, odd));
    }
}

/* Some panels. */
typedef struct {
    const char *packed[PANELS];          /* as they lie in memory */
    const char *tiles[PANELS];           /* as tiles: there, or in the scratch */
    const Exception *exceptions[PANELS]; /* of CODED, those that are not yet in their places */
    const uint16_t *exponents;           /* of CODED */
    int64_t bytes;                       /* of a packed tile */
    int64_t step;                        /* bytes from here to the panels that come next */
    int64_t k;
} Weights;

/* A tile of CODED: signs and fractions, and what else is in their 32 bits gives way to the exponents. */
INLINE void decode_tile(const char *from, const uint16_t *exponents, char *to) {
    const __m512i table = _mm512_loadu_si512(exponents), kept = _mm512_set1_epi32((int32_t)SIGN_AND_FRACTION);
#define DECODE(row, rest, numbers) /* (rest & kept) | exponents */ \
    _mm512_store_si512(to + (row) * 64, \
                       _mm512_ternarylogic_epi32(rest, kept, _mm512_permutexvar_epi16(numbers, table), 0xea));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++, to += 4 * 64) {
        __m512i numbers = _mm512_loadu_si512(from + i * 64);
        __m512i low = _mm512_loadu_si512(from + NUMBERS_BYTES + i * 128);
        __m512i high = _mm512_loadu_si512(from + NUMBERS_BYTES + i * 128 + 64);
        DECODE(0, low, numbers)
        DECODE(1, _mm512_rol_epi32(low, 8), _mm512_srli_epi16(numbers, 4))
        DECODE(2, high, _mm512_srli_epi16(numbers, 8))
        DECODE(3, _mm512_rol_epi32(high, 8), _mm512_srli_epi16(numbers, 12))
    }
#undef DECODE
}

/* Bytes of a packed tile. */
INLINE int64_t tile_bytes(int format) {
    return format == BYTE ? TILE_BYTES / 2 : format == CODED ? CODED_BYTES : TILE_BYTES;
}

/* Those of bfloat16 are tiles as they lie, but for a last one, which is filled up. */
INLINE Weights find_weights(int format, const Linear *l, int panels, int64_t panel, const TileScratch *s) {
    int64_t bytes = panel_bytes(format, l->k), depth = depth_tiles(l->k), whole = l->k / TILE_DEPTH;
    Panels at = panels_of(l, bytes);
    const char *from = (const char *)l->weights + panel / 2 * at.pair_step;
    Weights w = {.bytes = tile_bytes(format), .step = panels / 2 * at.pair_step, .k = l->k};
    Coded coded = {0};
    if (format == CODED) coded = coded_of(l->weights, l->n, l->k), w.exponents = coded.exponents;
    for (int p = 0; p < panels; p++) {
        char *own = s->widened + p * depth * TILE_BYTES;
        w.packed[p] = from + (p & 1) * at.odd_step + (p >> 1) * at.pair_step;
        w.tiles[p] = format == BRAIN && whole == depth ? w.packed[p] : own;
        if (format == CODED) w.exceptions[p] = exceptions_of(&coded, (w.packed[p] - (const char *)l->weights) / bytes);
        if (format != BRAIN || whole == depth) continue;
        memset(own + whole * TILE_BYTES, 0, TILE_BYTES);
        memcpy(own, w.packed[p], (size_t)bytes);
    }
    return w;
}

/* Tile i of panel p of bytes or CODED as bfloat16, into place i & mask. In each panel i only grows. */
INLINE void unpack_tile(int format, Weights *w, int p, int64_t i, int64_t mask) {
    const char *from = w->packed[p] + i * w->bytes;
    char *to = (char *)w->tiles[p] + (i & mask) * TILE_BYTES;
    if (format == BYTE) {
        widen_tile((const int8_t *)from, w->k - i * TILE_DEPTH, to);
        return;
    }
    decode_tile(from, w->exponents, to);
    w->exceptions[p] = put_exceptions(w->exceptions[p], i, (uint16_t *)to);
}

#endif
