/* How a token is chosen from a row of logits, and how probable it was. One thread reads a row, in an order that the row
   alone fixes: neither the other rows nor the number of threads touch a result. Nothing is sorted but the answer. */
#include <float.h>
#include <omp.h>
#include <stdlib.h>
#include "vector.h"

#define BLOCK 64              /* tokens that share a peak, their largest logit, and a sum of weights */
#define PARTS 256             /* of a range of keys */
#define CHAINS 4              /* sums of a part that do not wait for each other */
#define LEAST_EXPONENT 87.3f  /* exp8 gives 0 below its negative */
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

typedef struct {
    float *row, *peaks, *keys, *weights, *window, *shares;
    int32_t *ids;
    double *sums;
} Scratch;

static int64_t padded(int64_t vocabulary) { return (vocabulary / BLOCK + 2) * BLOCK; }

int64_t pawl_sampling_scratch_bytes(int64_t vocabulary) { return padded(vocabulary) * 8 * (int64_t)sizeof(float); }

static Scratch scratch_of(char *memory, int64_t vocabulary) {
    int64_t n = padded(vocabulary);
    float *at = (float *)(memory + omp_get_thread_num() * pawl_sampling_scratch_bytes(vocabulary));
    float *small = at + 6 * n; /* [2n]: peaks and sums are a value per block */
    return (Scratch){at, small, at + n, at + 2 * n, at + 3 * n, at + 4 * n, (int32_t *)(at + 5 * n), (double *)(small + n)};
}

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

/* The largest logit of each block, and of all. *finite: whether all are numbers and none infinite. */
static float find_peaks(const float *x, int64_t n, float *peaks, int *finite) {
    v8 odd = all8(0.0f);
    float best = -INFINITY, rest = 0.0f;
    for (int64_t begin = 0; begin < n; begin += BLOCK, peaks++) {
        int64_t end = begin + BLOCK < n ? begin + BLOCK : n, i = begin;
        v8 most = all8(-INFINITY);
        for (; i + LANES <= end; i += LANES) {
            v8 value = load8(x + i);
            odd += value * all8(0.0f); /* NaN where infinite or NaN */
            most = max8(value, most);
        }
        *peaks = largest8(most);
        for (; i < end; i++) {
            rest += x[i] * 0.0f;
            if (x[i] > *peaks) *peaks = x[i];
        }
        if (*peaks > best) best = *peaks;
    }
    *finite = sum8(odd) + rest == 0.0f;
    return best;
}

static int64_t first_of(const float *x, int64_t n, const float *peaks, float value) {
    int64_t i = 0;
    while (peaks[i / BLOCK] != value) i += BLOCK;
    while (i < n && x[i] != value) i++;
    return i;
}

INLINE int any8(v8i x) {
#if defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
    int any = 0;
    for (int i = 0; i < LANES; i++) any |= x[i];
    return any;
#endif
}

INLINE int64_t size_of_block(int64_t begin, int64_t n) { return n - begin < BLOCK ? n - begin : BLOCK; }

/* A block's logits, or a copy filled up with -infinity where the row ends. */
INLINE const float *whole_block(const float *x, int64_t size, float *copy) {
    if (size == BLOCK) return x;
    memcpy(copy, x, (size_t)size * sizeof(float));
    for (int64_t i = size; i < BLOCK; i++) copy[i] = -INFINITY;
    return copy;
}

/* weights = exp((x - best) * inverse), 0 past the end of the last block, but for blocks without a logit of at least
   `bound`; returns the sum. peaks: NULL for all blocks. */
static double weigh(const float *x, int64_t n, const float *peaks, float bound, float best, float inverse, float *weights) {
    float copy[BLOCK];
    double total = 0.0;
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        if (peaks && !(peaks[begin / BLOCK] >= bound)) continue;
        const float *block = whole_block(x + begin, size_of_block(begin, n), copy);
        v8 sum = all8(0.0f);
        for (int64_t i = 0; i < BLOCK; i += LANES) {
            v8 weight = exp8((load8(block + i) - all8(best)) * all8(inverse));
            store8(weights + begin + i, weight);
            sum += weight;
        }
        total += (double)sum8(sum);
    }
    return total;
}

/* Ids and logits of at least `bound`, in order of ids; their number. Looks only into blocks that have one. */
static int64_t gather(const float *x, int64_t n, const float *peaks, float bound, int32_t *ids, float *keys) {
    float copy[BLOCK];
    int64_t found = 0;
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        if (!(peaks[begin / BLOCK] >= bound)) continue;
        const float *block = whole_block(x + begin, size_of_block(begin, n), copy);
        for (int64_t i = 0; i < BLOCK; i += LANES) {
            if (!any8(load8(block + i) >= all8(bound))) continue;
            for (int64_t j = i; j < i + LANES; j++) {
                ids[found] = (int32_t)(begin + j);
                keys[found] = block[j];
                found += block[j] >= bound;
            }
        }
    }
    return found;
}

/* Parts of a range of keys, best first; monotone, so that a part holds neighbours in the order of keys. */
INLINE void find_parts(const float *keys, int64_t size, double high, double scale, int32_t *parts) {
    for (int64_t i = 0; i < size; i++) {
        double part = (high - (double)keys[i]) * scale;
        parts[i] = (int32_t)(part < PARTS - 1 ? part : PARTS - 1);
    }
}

typedef struct {
    float key;    /* tokens above it are kept */
    int64_t ties; /* and so many equal to it, the first ones */
} Cut;

/* Where the tokens, best key first, reach a mass: each is kept while those before it do not. `weights` is NULL for one
   each; else equal keys have equal weights. The range of keys, low to high, is cut into parts, and the part in which the
   mass is reached is cut again, until one key is left; no sort. peaks: NULL, or what blocks without a key of at least
   `low` are passed over by. */
static Cut find_cut(const float *keys, const float *weights, int64_t n, const float *peaks, float low, float high,
                    double reach, const Scratch *s) {
    int32_t parts[BLOCK];
    double above = 0.0, each = 1.0;
    while (low < high) {
        double masses[PARTS][CHAINS] = {{0}}, top = (double)high, scale = PARTS / (top - (double)low), sum = above;
        for (int64_t begin = 0; begin < n; begin += BLOCK) {
            if (peaks && !(peaks[begin / BLOCK] >= low)) continue;
            int64_t size = size_of_block(begin, n);
            find_parts(keys + begin, size, top, scale, parts);
            for (int64_t i = 0; i < size; i++)
                masses[parts[i]][i % CHAINS] += weights ? (double)weights[begin + i] : 1.0;
        }
        int found = 0;
        for (int part = 0; part < PARTS; part++) {
            double mass = (masses[part][0] + masses[part][1]) + (masses[part][2] + masses[part][3]);
            if (mass <= 0.0) continue;
            found = part, above = sum, sum += mass;
            if (sum >= reach) break;
        }
        int64_t left = 0;
        float least = low;
        low = INFINITY, high = -INFINITY;
        for (int64_t begin = 0; begin < n; begin += BLOCK) {
            if (peaks && !(peaks[begin / BLOCK] >= least)) continue;
            int64_t size = size_of_block(begin, n);
            find_parts(keys + begin, size, top, scale, parts);
            for (int64_t i = 0; i < size; i++) {
                if (parts[i] != found) continue;
                float key = keys[begin + i];
                s->shares[left] = weights ? weights[begin + i] : 1.0f;
                s->window[left++] = key;
                low = key < low ? key : low;
                high = key > high ? key : high;
            }
        }
        keys = s->window, weights = s->shares, peaks = NULL, n = left;
        each = (double)s->shares[0];
    }
    double ties = each > 0.0 ? ceil((reach - above) / each) : (double)n;
    return (Cut){low, ties < 1.0 ? 1 : ties < (double)n ? (int64_t)ties : n};
}

/* A logit that at least k tokens reach and not many more: the k-th best peak. */
static float bound_of_best(const float *peaks, int64_t n, float best, int64_t k, const Scratch *s) {
    int64_t blocks = (n + BLOCK - 1) / BLOCK, found = 0;
    float low = best;
    for (int64_t i = 0; i < blocks; i++) {
        if (!(peaks[i] >= -FLT_MAX)) continue;
        low = peaks[i] < low ? peaks[i] : low;
        s->keys[found++] = peaks[i];
    }
    return k < found ? find_cut(s->keys, NULL, found, NULL, low, best, (double)k, s).key : -FLT_MAX;
}

static float lowest(const float *keys, int64_t n) {
    float low = INFINITY;
    for (int64_t i = 0; i < n; i++) low = keys[i] < low ? keys[i] : low;
    return low;
}

/* The k best tokens into s->ids and s->keys, in order of ids; their number. Among equals the lower ids. */
static int64_t take_best(const float *x, int64_t n, const float *peaks, float best, int64_t k, const Scratch *s) {
    int64_t found = gather(x, n, peaks, bound_of_best(peaks, n, best, k, s), s->ids, s->keys), left = 0;
    if (found <= k) return found;
    Cut cut = find_cut(s->keys, NULL, found, NULL, lowest(s->keys, found), best, (double)k, s);
    for (int64_t i = 0; i < found; i++) {
        float key = s->keys[i];
        int tied = (key == cut.key) & (cut.ties > 0);
        cut.ties -= tied;
        s->keys[left] = key;
        s->ids[left] = s->ids[i];
        left += (key > cut.key) | tied;
    }
    return left;
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
            chosen[i] = first_of(x, vocabulary, s.peaks, best);
        } else {
            double noise = uniform(c->seed[rows[i]], (uint64_t)positions[i]);
            chosen[i] = filter_and_draw(x, vocabulary, best, c, rows[i], noise, &s);
        }
    }
}

typedef struct {
    float key;
    int32_t id;
} Entry;

static int by_key(const void *left, const void *right) {
    const Entry *a = left, *b = right;
    if (a->key != b->key) return a->key > b->key ? -1 : 1;
    return a->id < b->id ? -1 : a->id > b->id;
}

static int64_t count_above(const float *x, int64_t n, const float *peaks, float value) {
    int64_t found = 0;
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        if (!(peaks[begin / BLOCK] > value)) continue;
        int64_t end = begin + BLOCK < n ? begin + BLOCK : n;
        for (int64_t i = begin; i < end; i++) found += x[i] > value;
    }
    return found;
}

/* For each i the token token_ids[i] under the softmax of row rows[i] of scores: its log-probability, its rank (one more
   than the tokens with a higher logit), and its num_alternatives[i] best tokens, [count, most]; among equals the lower
   ids first. A row that is not finite gives NaN. */
void pawl_describe_tokens(const float *scores, int64_t count, int64_t vocabulary, const int64_t *rows,
                          const int64_t *token_ids, const int64_t *num_alternatives, int64_t most, float *logprobs,
                          int64_t *ranks, int64_t *alternative_ids, float *alternative_logprobs, char *scratch,
                          int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (count > 1)
    for (int64_t i = 0; i < count; i++) {
        Scratch s = scratch_of(scratch, vocabulary);
        const float *x = scores + rows[i] * vocabulary, own = x[token_ids[i]];
        int finite;
        float best = find_peaks(x, vocabulary, s.peaks, &finite);
        if (!finite) {
            logprobs[i] = NAN;
            continue;
        }
        double scale = (double)best + log(weigh(x, vocabulary, s.peaks, -INFINITY, best, 1.0f, s.weights));
        logprobs[i] = (float)((double)own - scale);
        ranks[i] = 1 + count_above(x, vocabulary, s.peaks, own);
        int64_t wanted = num_alternatives[i];
        if (wanted < 1) continue;
        int64_t found = take_best(x, vocabulary, s.peaks, best, wanted, &s);
        Entry *entries = (Entry *)s.window; /* and the shares, which lie behind it */
        for (int64_t j = 0; j < found; j++) entries[j] = (Entry){s.keys[j], s.ids[j]};
        qsort(entries, (size_t)found, sizeof(Entry), by_key);
        for (int64_t j = 0; j < found; j++) {
            alternative_ids[i * most + j] = entries[j].id;
            alternative_logprobs[i * most + j] = (float)((double)entries[j].key - scale);
        }
    }
}
