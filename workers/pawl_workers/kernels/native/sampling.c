/* How a token is chosen from a row of logits. One thread reads a row, in an order that the row alone fixes: neither the
   other rows nor the number of threads touch a result. */
#include <float.h>
#include <omp.h>

#include "best_tokens.h"
#include "vector.h"

#define LEAST_EXPONENT 87.3f /* exp8 gives 0 below its negative */
#define NOT_FINITE -1
#define NOTHING_LEFT -2

/* By row of the worker's table. */
typedef struct {
    const double *temperature, *top_p, *min_p;
    const int64_t *top_k;
    const uint64_t *seed;
    const float *repetition;
} Columns;

/* By sample i: entries starts[i] to starts[i + 1]. */
typedef struct {
    const int64_t *seen_starts, *seen_ids;
    const float *seen_offsets;
    const int64_t *bias_starts, *bias_ids;
    const float *bias_values;
    const uint32_t *masks;  /* NULL: none; [masks, words], bit 1 = allowed */
    const int64_t *mask_of; /* -1: none */
    int64_t words;
} Adjustments;

/* The uniform number in [0, 1) of a seed and a position; noise.py says the same in numpy.
   Source: Salmon, Moraes, Dror, Shaw, SC 2011 (Philox4x32-10). */
static double uniform(uint64_t seed, uint64_t position) {
    uint32_t c0 = (uint32_t)position, c1 = (uint32_t)(position >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1, c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return (double)(((uint64_t)c0 << 32 | c1) >> 11) * 0x1p-53;
}

static int64_t first_equal(const float *x, int64_t n, const float *peaks, float value) {
    int64_t i = 0;
    while (peaks[i / BLOCK] != value) i += BLOCK;
    while (i < n && x[i] != value) i++;
    return i;
}

/* Weights of 0 for the keys equal to the cut's that it does not keep. */
static void drop_ties(const float *keys, float *weights, int64_t n, const float *peaks, Cut cut) {
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        if (peaks && !(peaks[begin / BLOCK] >= cut.key)) continue;
        int64_t end = begin + size_of_block(begin, n);
        for (int64_t i = begin; i < end; i += LANES) {
            int64_t stop = i + LANES < end ? i + LANES : end;
            if (stop - i == LANES && !any8(load8(keys + i) == all8(cut.key))) continue;
            for (int64_t j = i; j < stop; j++)
                if (keys[j] == cut.key && cut.ties-- <= 0) weights[j] = 0.0f;
        }
    }
}

/* The index of a token with a key of at least `bound` and a weight of at least `min_p`: the first, in order of ids, whose
   cumulative weight exceeds noise * total. */
static int64_t draw(const float *keys, const float *weights, int64_t n, const float *peaks, float bound, float min_p,
                    double noise, const Scratch *s) {
    int64_t blocks = (n + BLOCK - 1) / BLOCK, block = 0, last = 0;
    double sum = 0.0;
    for (int64_t b = 0; b < blocks; b++) {
        if (!peaks || peaks[b] >= bound) {
            v8 kept = all8(0.0f);
            float rest = 0.0f;
            int64_t i = b * BLOCK, end = i + size_of_block(i, n);
            for (; i + LANES <= end; i += LANES) {
                v8 weight = load8(weights + i);
                kept += (v8)((v8i)weight & (load8(keys + i) >= all8(bound)) & (weight >= all8(min_p)));
            }
            for (; i < end; i++) rest += keys[i] >= bound && weights[i] >= min_p ? weights[i] : 0.0f;
            sum += (double)(sum8(kept) + rest);
        }
        s->sums[b] = sum;
    }
    double target = noise * sum;
    while (block < blocks - 1 && s->sums[block] <= target) block++;
    while (block > 0 && s->sums[block] == s->sums[block - 1]) block--; /* rounding, where the last blocks weigh nothing */
    double below = block ? s->sums[block - 1] : 0.0;
    for (int64_t i = block * BLOCK; i < block * BLOCK + size_of_block(block * BLOCK, n); i++) {
        if (!(keys[i] >= bound && weights[i] >= min_p && weights[i] > 0.0f)) continue;
        last = i;
        below += (double)weights[i];
        if (below > target) return i;
    }
    return last; /* rounding: the last that has any weight */
}

/* Keeps the best tokens whose weights reach a mass; the key that those have at least. */
static float cut_at_mass(const float *keys, float *weights, int64_t n, const float *peaks, float low, float best,
                         double reach, const Scratch *s) {
    Cut cut = find_cut(keys, weights, n, peaks, low, best, reach, s);
    drop_ties(keys, weights, n, peaks, cut);
    return cut.key;
}

/* A logit below which weights are less than `least`; weights of 0 count for nothing. */
static float bound_of_weight(double least, float best, double temperature) {
    double depth = least > 0.0 ? -log(least) : LEAST_EXPONENT, bound;
    bound = (double)best - (depth < LEAST_EXPONENT ? depth : LEAST_EXPONENT) * temperature;
    return bound > -FLT_MAX ? (float)bound : -FLT_MAX;
}

/* Temperature, top-k, top-p and min-p, in this order, then the draw. */
static int64_t filter_and_draw(const float *x, int64_t n, float best, const Columns *c, int64_t row, double noise,
                               const Scratch *s) {
    int64_t top_k = c->top_k[row];
    double temperature = c->temperature[row] > 1e-30 ? c->temperature[row] : 1e-30, top_p = c->top_p[row], total;
    float inverse = (float)(1.0 / temperature), min_p = (float)c->min_p[row], bound = -INFINITY;
    if (top_k > 0 && top_k < n) {
        int64_t found = take_best(x, n, s->peaks, best, top_k, s);
        total = weigh(s->keys, found, NULL, bound, best, inverse, s->weights);
        if (top_p < 1.0) {
            float low = lowest(s->keys, found);
            bound = cut_at_mass(s->keys, s->weights, found, NULL, low, best, top_p * total, s);
        }
        return s->ids[draw(s->keys, s->weights, found, NULL, bound, min_p, noise, s)];
    }
    if (top_p < 1.0) { /* tokens that weigh less than half of (1 - top_p) / n of the mass are not reached */
        total = weigh(x, n, s->peaks, bound, best, inverse, s->weights);
        float low = bound_of_weight((1.0 - top_p) * total / (2.0 * (double)n), best, temperature);
        bound = cut_at_mass(x, s->weights, n, s->peaks, low, best, top_p * total, s);
    } else {
        if (min_p > 0.0f) bound = bound_of_weight(0.999 * (double)min_p, best, temperature);
        weigh(x, n, s->peaks, bound, best, inverse, s->weights);
    }
    return draw(x, s->weights, n, s->peaks, bound, min_p, noise, s);
}

static int is_adjusted(const Adjustments *a, int64_t i) {
    return a && (a->seen_starts[i] < a->seen_starts[i + 1] || a->bias_starts[i] < a->bias_starts[i + 1] ||
                 (a->masks && a->mask_of[i] >= 0));
}

/* Penalties, bias and mask, in this order. Penalties as in Keskar et al., CTRL, 2019, section 4.1. */
static void adjust(const Adjustments *a, int64_t i, float repetition, float *row, int64_t n) {
    for (int64_t at = a->seen_starts[i]; at < a->seen_starts[i + 1]; at++) {
        float *x = row + a->seen_ids[at];
        *x = (*x > 0.0f ? *x / repetition : *x * repetition) - a->seen_offsets[at];
    }
    for (int64_t at = a->bias_starts[i]; at < a->bias_starts[i + 1]; at++) row[a->bias_ids[at]] += a->bias_values[at];
    if (!a->masks || a->mask_of[i] < 0) return;
    const uint32_t *mask = a->masks + a->mask_of[i] * a->words;
    for (int64_t begin = 0; begin < n; begin += 32) {
        uint32_t allowed = begin / 32 < a->words ? mask[begin / 32] : 0;
        int64_t end = begin + 32 < n ? begin + 32 : n;
        if (allowed == 0xffffffffu) continue;
        for (int64_t j = begin; j < end; j++)
            if (!(allowed >> (j - begin) & 1)) row[j] = -INFINITY;
    }
}

/* scores [count, vocabulary] -> chosen [count]: a token of each, NOT_FINITE or NOTHING_LEFT. Sample i belongs to row
   rows[i] of the table, and its token to positions[i]. adjustments: NULL for none. scores are not changed. */
void pawl_choose_tokens(const float *scores, int64_t count, int64_t vocabulary, const int64_t *rows, const int64_t *positions,
                        const void *columns, const void *adjustments, int64_t *chosen, char *scratch, int32_t threads) {
    const Columns *c = columns;
    const Adjustments *a = adjustments;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (count > 1)
    for (int64_t i = 0; i < count; i++) {
        Scratch s = scratch_of(scratch, vocabulary);
        const float *x = scores + i * vocabulary;
        int finite, ignored;
        float best = find_peaks(x, vocabulary, s.peaks, &finite);
        if (!finite) {
            chosen[i] = NOT_FINITE;
            continue;
        }
        if (is_adjusted(a, i)) {
            memcpy(s.row, x, (size_t)vocabulary * sizeof(float));
            adjust(a, i, c->repetition[rows[i]], s.row, vocabulary);
            x = s.row;
            best = find_peaks(x, vocabulary, s.peaks, &ignored);
        }
        if (!(best >= -FLT_MAX && best <= FLT_MAX)) {
            chosen[i] = NOTHING_LEFT;
        } else if (c->temperature[rows[i]] == 0.0) {
            chosen[i] = first_equal(x, vocabulary, s.peaks, best);
        } else {
            double noise = uniform(c->seed[rows[i]], (uint64_t)positions[i]);
            chosen[i] = filter_and_draw(x, vocabulary, best, c, rows[i], noise, &s);
        }
    }
}
