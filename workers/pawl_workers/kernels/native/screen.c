/* Greedy decoding asks for the token with the highest logit, and for no logit. Here rows and weights are rounded to bytes,
   whose products take a quarter of the instructions and half of the bytes that the exact ones take; and since the lengths
   of what was rounded off are known, a logit is bounded from both sides:

     |x w - x' w'| <= |x - x'| |w| + |x'| |w - w'|

   by the inequality of Cauchy and Schwarz, and what rounding adds where the exact one is computed. A token whose upper
   bound is below another's lower bound is not the one. Of those that are left the exact logits are computed, with the bits
   that they always have; so the token is the one that all logits would have given, and the first one among equals.

   A row that is not finite, or so large that a sum may not be, has no bounds: all its logits are computed. */
#include "screen.h"

#include <float.h>
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <string.h>

#include "ends.h"
#include "screen_bytes.h"

#define MOST_BYTE 127
#define LEAST 1e-15f  /* of a row's largest: below it bytes are not exact enough */
#define SLACK 1e-30f  /* for what is too small for a float */
#define CHUNK_PAIRS 4 /* that a thread takes at a time */

#if WIDTH == 16
#define ROWS 12 /* times two panels: as many sums as registers hold */
#else
#define ROWS 6
#endif

/* Products of four bytes each, added up: weights [WIDTH][4] with the same four bytes of a row. */
INLINE vwi add_bytes(vwi sums, const uint8_t *weights, const int8_t *bytes) {
    int32_t four;
    memcpy(&four, bytes, sizeof four);
#if defined(__AVX512VNNI__)
    return (vwi)_mm512_dpbusd_epi32((__m512i)sums, _mm512_loadu_si512(weights), _mm512_set1_epi32(four));
#elif WIDTH == 16
    __m512i twos = _mm512_maddubs_epi16(_mm512_loadu_si512(weights), _mm512_set1_epi32(four));
    return sums + (vwi)_mm512_madd_epi16(twos, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    __m256i twos = _mm256_maddubs_epi16(_mm256_loadu_si256((const __m256i *)weights), _mm256_set1_epi32(four));
    return sums + (vwi)_mm256_madd_epi16(twos, _mm256_set1_epi16(1));
#else
    for (int c = 0; c < WIDTH; c++)
        for (int i = 0; i < 4; i++) sums[c] += weights[c * 4 + i] * bytes[i];
    return sums;
#endif
}

Screened screened_of(char *memory, int64_t rows, int64_t k, int64_t n) {
    Screened s = {.rows = (ScreenedRow *)memory, .padded = fours_in(k) * 4, .pairs = panels_in(n) / 2};
    s.bytes = (int8_t *)(s.rows + rows);
    s.ceilings = (float *)(s.bytes + rows * s.padded);
    return s;
}

int64_t pawl_screened_bytes(int64_t rows, int64_t k, int64_t n) {
    return rows * ((int64_t)sizeof(ScreenedRow) + fours_in(k) * 4 + panels_in(n) / 2 * (int64_t)sizeof(float));
}

static void quantise(const float *x, int64_t k, int8_t *bytes, int64_t padded, ScreenedRow *row) {
    float most = 0.0f, odd = 0.0f;
    double length = 0.0, rounded = 0.0, left = 0.0;
    int32_t sum = 0;
#pragma omp simd reduction(max : most) reduction(+ : odd)
    for (int64_t i = 0; i < k; i++) {
        most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        odd += x[i] * 0.0f; /* NaN where infinite or NaN */
    }
    float scale = most / MOST_BYTE;
    *row = (ScreenedRow){.floor = -INFINITY, .doubtful = odd != 0.0f || most > LARGEST || (most > 0.0f && most < LEAST)};
    memset(bytes + k, 0, (size_t)(padded - k));
    float inverse = scale > 0.0f && !row->doubtful ? 1.0f / scale : 0.0f;
#pragma omp simd reduction(+ : length, left, rounded, sum)
    for (int64_t i = 0; i < k; i++) {
        float byte = inverse == 0.0f ? 0.0f : rintf(x[i] * inverse);
        double rest = (double)x[i] - (double)scale * (double)byte;
        length += (double)x[i] * (double)x[i], left += rest * rest;
        rounded += (double)byte * (double)byte;
        bytes[i] = (int8_t)byte;
        sum += (int32_t)byte;
    }
    row->scale = scale;
    /* The exact logit is a sum of k products, each rounded by 2^-24 of all that is added up, which is at most |x| |w|; so are
       the few roundings of the bounds. */
    row->error = not_below((sqrt(left) + sqrt(length) * ((double)k * 1.01 + 64.0) * 0x1p-24) * (1.0 + 1e-6));
    row->length = not_below((double)scale * sqrt(rounded) * (1.0 + 1e-6));
    row->offset = sum * MIDDLE;
}

void quantise_part(const Screen *screen, const float *x, int64_t rows, const Screened *to, int64_t *next) {
    int thread = omp_get_thread_num();
    for (int64_t row; (row = take_item(next, rows, 0, thread)) >= 0;)
        quantise(x + row * screen->k, screen->k, to->bytes + row * to->padded, to->padded, to->rows + row);
}

/* Raise what all threads know. */
INLINE void raise_floor(float *floor, float value) {
    uint32_t *at = (uint32_t *)floor, before = __atomic_load_n(at, __ATOMIC_RELAXED), after;
    memcpy(&after, &value, sizeof after);
    for (float known; memcpy(&known, &before, sizeof known), known < value;)
        if (__atomic_compare_exchange_n(at, &before, after, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return;
}

/* What a tile fetches of the panels that come next, with each four inputs: a line from `at` on, or, of one tile alone, a
   line of each panel. */
typedef struct {
    const uint8_t *at;
    int64_t step;
} Fetched;

/* Some rows times two panels. alone: whether these are all rows. */
INLINE void screen_tile(const Screen *w, int rows, int alone, int64_t pair, int64_t row, const Screened *s, Fetched fetched) {
    int64_t fours = fours_in(w->k), size = panel_size(w->k);
    const uint8_t *even = w->weights + 2 * pair * size, *odd = even + size;
    const int8_t *bytes = s->bytes + row * s->padded;
    vwi sums[ROWS * 2];
    for (int i = 0; i < rows * 2; i++) sums[i] = (vwi){0};
    for (int64_t i = 0; i < fours; i++) {
        __builtin_prefetch(fetched.at + i * fetched.step);
        if (alone) __builtin_prefetch(fetched.at + size + i * fetched.step);
        for (int r = 0; r < rows; r++) {
            sums[2 * r] = add_bytes(sums[2 * r], even + i * WIDTH * 4, bytes + r * s->padded + i * 4);
            sums[2 * r + 1] = add_bytes(sums[2 * r + 1], odd + i * WIDTH * 4, bytes + r * s->padded + i * 4);
        }
    }
    for (int r = 0; r < rows; r++) {
        ScreenedRow *at = s->rows + row + r;
        vw ceiling = allw(-INFINITY), floor = allw(-INFINITY);
        for (int p = 0; p < 2; p++) {
            const float *column = w->columns + (2 * pair + p) * 3 * WIDTH;
            vw product = __builtin_convertvector(sums[2 * r + p] - at->offset, vw) * loadw(column) * allw(at->scale);
            vw error = fmaw(allw(at->error), loadw(column + WIDTH), allw(at->length) * loadw(column + 2 * WIDTH));
            error += allw(SLACK);
            ceiling = maxw(ceiling, product + error);
            floor = maxw(floor, product - error);
        }
        s->ceilings[(row + r) * s->pairs + pair] = largestw(ceiling);
        if (2 * (pair + 1) * WIDTH <= w->n) raise_floor(&at->floor, largestw(floor)); /* past the end are no tokens */
    }
}

typedef void Tile(const Screen *w, int64_t pair, int64_t row, const Screened *s, Fetched fetched);
#define TILE(rows, name, alone)                                                                            \
    static void name##_##rows(const Screen *w, int64_t pair, int64_t row, const Screened *s, Fetched fetched) { \
        screen_tile(w, rows, alone, pair, row, s, fetched);                                                \
    }
#define ALONE_TILE(rows) TILE(rows, alone, 1)
#define SHARING_TILE(rows) TILE(rows, sharing, 0)
#define ALONE_NAME(rows) alone_##rows,
#define SHARING_NAME(rows) sharing_##rows,
#if ROWS == 12
#define FEW(DO) DO(1) DO(2) DO(3) DO(4) DO(5)
#define MANY(DO) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12)
#else
#define FEW(DO) DO(1) DO(2)
#define MANY(DO) DO(3) DO(4) DO(5) DO(6)
#endif
FEW(ALONE_TILE) MANY(ALONE_TILE) MANY(SHARING_TILE)
static Tile *const ALONE[] = {FEW(ALONE_NAME) MANY(ALONE_NAME)};
static Tile *const SHARING[] = {MANY(SHARING_NAME)}; /* from ROWS / 2 on */

/* Panels from both ends, so that each of two threads goes on where it was, and fetches what it takes next. */
void screen_part(const Screen *w, int64_t rows, const Screened *s, int64_t *next) {
    int thread = omp_get_thread_num();
    int64_t items = (s->pairs + CHUNK_PAIRS - 1) / CHUNK_PAIRS, tiles = (rows + ROWS - 1) / ROWS;
    int64_t step = from_the_last(thread) ? -1 : 1, bytes = 2 * panel_size(w->k);
    for (int64_t item; (item = take_item(next, items, 0, thread)) >= 0;) {
        int64_t begin = item * CHUNK_PAIRS, end = smaller(begin + CHUNK_PAIRS, s->pairs);
        for (int64_t pair = step > 0 ? begin : end - 1; pair >= begin && pair < end; pair += step) {
            const uint8_t *then = w->weights + (pair + step) * bytes;
            if (tiles == 1) ALONE[rows - 1](w, pair, 0, s, (Fetched){then, WIDTH * 4});
            for (int64_t tile = 0, row = 0, last; tiles > 1 && tile < tiles; tile++, row = last) {
                last = (tile + 1) * rows / tiles;
                SHARING[last - row - ROWS / 2](w, pair, row, s, (Fetched){then + tile * bytes / tiles, WIDTH * 8 / tiles});
            }
        }
    }
}

/* The highest logit so far, and its token, the first one among equals. */
typedef struct {
    float logit;
    int64_t token;
    int odd; /* some logit is not finite */
} Best;

INLINE int may_hold_best(const Screened *s, int64_t row, int64_t pair, const Best *best) {
    const ScreenedRow *at = s->rows + row;
    float ceiling = s->ceilings[row * s->pairs + pair];
    return at->doubtful || (ceiling >= at->floor && ceiling >= best->logit);
}

/* The exact logits of some rows in two panels. */
static void compare_pair(const Linear *l, int64_t pair, int64_t row, int64_t rows, float *wide, Best *best) {
    float logits[ROWS][2 * WIDTH];
    int64_t first = pair * 2 * WIDTH, next = 0;
    Linear some = *l;
    some.x += row * l->x_stride, some.m = rows, some.y = &logits[0][0], some.y_stride = 2 * WIDTH;
    some.n = smaller(l->n - first, 2 * WIDTH);
    some.weights = (const char *)l->weights + pair * 2 * panel_bytes(l->format, l->k);
    Fetch nothing = fetch_for(NULL, 0, 1);
    linear_part(&some, &next, 1, wide, &nothing);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < some.n; i++) {
            float logit = logits[r][i];
            best[r].odd |= !(fabsf(logit) <= FLT_MAX);
            if (logit > best[r].logit || (logit == best[r].logit && first + i < best[r].token))
                best[r].logit = logit, best[r].token = first + i;
        }
}

/* Where the best token most likely is. */
static int64_t likeliest_pair(const Screened *s, int64_t row) {
    const float *ceilings = s->ceilings + row * s->pairs;
    int64_t found = 0;
    for (int64_t pair = 1; pair < s->pairs; pair++)
        if (ceilings[pair] > ceilings[found]) found = pair;
    return found;
}

/* The exact logit of what is likely the best leaves few others. */
void choose_part(const Linear *l, const Screened *s, int64_t *chosen, int64_t *next, int32_t threads, float *wide) {
    int64_t block = smaller((l->m + threads - 1) / threads, ROWS);
    int thread = omp_get_thread_num();
    for (int64_t item; (item = take_item(next, (l->m + block - 1) / block, 0, thread)) >= 0;) {
        int64_t row = item * block, end = smaller(row + block, l->m), likeliest[ROWS];
        Best best[ROWS];
        for (int64_t r = row; r < end; r++) {
            best[r - row] = (Best){-INFINITY, l->n, 0};
            likeliest[r - row] = s->rows[r].doubtful ? -1 : likeliest_pair(s, r);
            if (likeliest[r - row] >= 0) compare_pair(l, likeliest[r - row], r, 1, wide, best + (r - row));
        }
        for (int64_t pair = 0; pair < s->pairs; pair++)
            for (int64_t from = row, to; from < end; from = to + 1) {
                for (to = from; to < end && pair != likeliest[to - row] && may_hold_best(s, to, pair, best + (to - row));) to++;
                if (from < to) compare_pair(l, pair, from, to - from, wide, best + (from - row));
            }
        for (int64_t r = row; r < end; r++) chosen[r] = best[r - row].odd ? -1 : best[r - row].token;
    }
}
