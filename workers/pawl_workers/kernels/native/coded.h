/* Panels of bfloat16 in 12 bits a weight, of which nothing is lost: sign and fraction take 8, and 4 say which of 16
   exponents it is, the layer's most frequent ones. A weight of another exponent is an exception, and lies apart.

   Memory: [panels][tiles] of CODED_BYTES, each [4][WIDTH][2] numbers of 16 bits, then [8][WIDTH] signs and fractions of 32.
   In panels of bfloat16 a tile is [16 pairs of k][WIDTH features][2]; four pairs have the numbers of their exponents in
   16 bits, the first one the lowest; two have their signs and fractions in 32, the first one in the places where bfloat16
   has them, the second one turned right by 8, which are the places of the exponents.
   Behind the panels: the exponents, [2][16] of 16 bits, where bfloat16 has them, and twice because they are looked up by
   five bits; where each panel's exceptions begin, [panels] of 32 bits; exceptions by panel and tile, and after those of
   each panel one of no tile.

   Source of the idea that exponents of trained weights need no 8 bits: Zhang et al., "70% Size, 100% Accuracy: Lossless LLM
   Compression for Efficient GPU Inference via Dynamic-Length Float", 2025, where they are coded by Huffman. */
#ifndef PAWL_CODED_H
#define PAWL_CODED_H

#include "panels.h"

#define CODED_DEPTH 32 /* k of a tile; there are whole ones alone */
#define CODED_BYTES (CODED_DEPTH * WIDTH * 3 / 2)
#define NUMBERS_BYTES (CODED_BYTES / 3)
#define EXPONENTS 16
#define SIGN_AND_FRACTION 0x807f807fu /* of two bfloat16 */
#define NO_TILE 0xffff

typedef struct {
    uint16_t tile, at, value; /* which of a tile's weights is what */
} Exception;

typedef struct {
    const uint16_t *exponents; /* [2][EXPONENTS] */
    const uint32_t *starts;
    const Exception *exceptions;
} Coded;

/* What lies behind the panels. */
INLINE Coded coded_of(const void *packed, int64_t n, int64_t k) {
    int64_t panels = panels_in(n);
    const char *at = (const char *)packed + panels * (k / CODED_DEPTH) * CODED_BYTES;
    const uint32_t *starts = (const uint32_t *)(at + 2 * EXPONENTS * sizeof(uint16_t));
    return (Coded){(const uint16_t *)at, starts, (const Exception *)(starts + panels)};
}

INLINE const Exception *exceptions_of(const Coded *coded, int64_t panel) {
    return coded->exceptions + coded->starts[panel];
}

/* Those of a tile that is decoded, into their places; returns the first one of a later tile. */
INLINE const Exception *put_exceptions(const Exception *next, int64_t tile, uint16_t *to) {
    for (; next->tile == tile; next++) to[next->at] = next->value;
    return next;
}

#endif
