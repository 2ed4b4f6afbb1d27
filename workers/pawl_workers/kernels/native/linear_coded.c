/* Weights of bfloat16 into the panels that coded.h describes, and back. */
#include "coded.h"

#include <string.h>

#include "linear_tiles.h"

#define VALUES 256                /* of an exponent */
#define PAIRS (CODED_DEPTH / 2)
#define WEIGHTS (PAIRS * 2 * WIDTH) /* of a tile */

int64_t pawl_multiplies_coded(void) { return in_tiles(CODED); }

INLINE int exponent_of(uint16_t weight) { return weight >> 7 & 0xff; }

/* counts [VALUES]: how many weights of w [n, k], rows `skip` weights apart, have each exponent. */
void pawl_count_exponents(const uint16_t *w, int64_t n, int64_t k, int64_t skip, int64_t *counts, int32_t threads) {
    memset(counts, 0, VALUES * sizeof *counts);
#pragma omp parallel num_threads(threads)
    {
        int64_t own[4][VALUES] = {{0}}; /* four, or each weight would wait for the one before */
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n; row++)
            for (int64_t i = 0; i < k; i++) own[i & 3][exponent_of(w[row * skip + i])]++;
#pragma omp critical(exponents)
        for (int value = 0; value < VALUES; value++)
            counts[value] += own[0][value] + own[1][value] + own[2][value] + own[3][value];
    }
}

/* A tile of bfloat16 -> one of CODED; returns how many weights have exponents without a number. */
static int code_tile(const uint16_t *tile, const uint8_t *numbers, char *to) {
    uint16_t coded[PAIRS / 4][2 * WIDTH];
    uint32_t rest[PAIRS / 2][WIDTH], pairs[PAIRS][WIDTH];
    int exceptions = 0;
    memcpy(pairs, tile, sizeof pairs);
    for (int i = 0; i < PAIRS / 2; i++)
        for (int c = 0; c < WIDTH; c++) {
            uint32_t first = pairs[2 * i][c] & SIGN_AND_FRACTION, second = pairs[2 * i + 1][c] & SIGN_AND_FRACTION;
            rest[i][c] = first | second >> 8 | second << 24;
        }
    for (int i = 0; i < PAIRS / 4; i++)
        for (int c = 0; c < 2 * WIDTH; c++) {
            int word = 0;
            for (int j = 0; j < 4; j++) {
                int number = numbers[exponent_of(tile[(4 * i + j) * 2 * WIDTH + c])];
                exceptions += number >> 4;
                word |= (number & 15) << 4 * j;
            }
            coded[i][c] = (uint16_t)word;
        }
    memcpy(to, coded, sizeof coded);
    memcpy(to + sizeof coded, rest, sizeof rest);
    return exceptions;
}

/* What a panel is coded from, and to. */
typedef struct {
    const uint16_t *w; /* [features, k], rows `skip` weights apart */
    char *to;
    int64_t features, k, skip;
} Source;

INLINE Source source_of(const uint16_t *w, char *packed, int64_t n, int64_t k, int64_t skip, int64_t panel) {
    int64_t first = panel * WIDTH, features = n - first < WIDTH ? n - first : WIDTH;
    return (Source){w + first * skip, packed + panel * (k / CODED_DEPTH) * CODED_BYTES, features, k, skip};
}

/* Returns the panel's exceptions, which are noted in `found` where that is not NULL. Features past the last one are zeros
   but for their exponents; nothing becomes of them. */
static int64_t code_panel(Source s, const uint8_t *numbers, Exception *found) {
    int64_t exceptions = 0;
    for (int64_t i = 0; i < s.k / CODED_DEPTH; i++) {
        uint16_t tile[WEIGHTS] = {0};
        for (int64_t c = 0; c < s.features; c++)
            for (int pair = 0; pair < PAIRS; pair++)
                memcpy(tile + (pair * WIDTH + c) * 2, s.w + c * s.skip + i * CODED_DEPTH + pair * 2, 4);
        if (!code_tile(tile, numbers, s.to + i * CODED_BYTES)) continue;
        for (int at = 0; at < WEIGHTS; at++) {
            if (at / 2 % WIDTH >= s.features || numbers[exponent_of(tile[at])] < EXPONENTS) continue;
            if (found) found[exceptions] = (Exception){(uint16_t)i, (uint16_t)at, tile[at]};
            exceptions++;
        }
    }
    return exceptions;
}

/* w [n, k], rows `skip` weights apart, k a multiple of CODED_DEPTH -> packed, with as many exceptions as there are weights
   of other exponents than those [EXPONENTS], which differ. */
void pawl_pack_coded(const uint16_t *w, char *packed, int64_t n, int64_t k, int64_t skip, const uint8_t *exponents,
                     int32_t threads) {
    int64_t panels = panels_in(n);
    Coded coded = coded_of(packed, n, k);
    uint16_t *table = (uint16_t *)coded.exponents;
    uint32_t *starts = (uint32_t *)coded.starts, total = 0;
    uint8_t numbers[VALUES];
    memset(numbers, EXPONENTS, sizeof numbers);
    for (int i = 0; i < EXPONENTS; i++) {
        numbers[exponents[i]] = (uint8_t)i;
        table[i] = table[EXPONENTS + i] = (uint16_t)(exponents[i] << 7);
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
        starts[panel] = (uint32_t)code_panel(source_of(w, packed, n, k, skip, panel), numbers, NULL);
    for (int64_t panel = 0; panel < panels; panel++) {
        int64_t own = starts[panel];
        Exception *at = (Exception *)coded.exceptions + total;
        starts[panel] = total;
        total += (uint32_t)own + 1;
        if (own) code_panel(source_of(w, packed, n, k, skip, panel), numbers, at); /* which are few */
        at[own] = (Exception){.tile = NO_TILE};
    }
}

/* A tile of CODED -> one of bfloat16. */
static void decode_tile(const char *from, const uint16_t *exponents, uint16_t *tile) {
    uint16_t coded[PAIRS / 4][2 * WIDTH];
    uint32_t rest[PAIRS / 2][WIDTH];
    memcpy(coded, from, sizeof coded);
    memcpy(rest, from + sizeof coded, sizeof rest);
    for (int pair = 0; pair < PAIRS; pair++)
        for (int c = 0; c < WIDTH; c++) {
            uint32_t word = rest[pair / 2][c];
            if (pair & 1) word = word << 8 | word >> 24;
            word &= SIGN_AND_FRACTION;
            for (int half = 0; half < 2; half++) {
                int number = coded[pair / 4][2 * c + half] >> pair % 4 * 4 & 15;
                tile[(pair * WIDTH + c) * 2 + half] = (uint16_t)(word >> 16 * half | exponents[number]);
            }
        }
}

/* What pawl_pack_coded made -> w [n, k], the bits of float32. */
void pawl_unpack_coded(const char *packed, uint32_t *w, int64_t n, int64_t k, int32_t threads) {
    int64_t panels = panels_in(n);
    Coded coded = coded_of(packed, n, k);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++) {
        const Exception *next = exceptions_of(&coded, panel);
        for (int64_t i = 0; i < k / CODED_DEPTH; i++) {
            uint16_t tile[WEIGHTS];
            decode_tile(packed + (panel * (k / CODED_DEPTH) + i) * CODED_BYTES, coded.exponents, tile);
            next = put_exceptions(next, i, tile);
            for (int64_t c = 0; c < WIDTH && panel * WIDTH + c < n; c++)
                for (int at = 0; at < CODED_DEPTH; at++)
                    w[(panel * WIDTH + c) * k + i * CODED_DEPTH + at] =
                        (uint32_t)tile[(at / 2 * WIDTH + c) * 2 + at % 2] << 16;
        }
    }
}
