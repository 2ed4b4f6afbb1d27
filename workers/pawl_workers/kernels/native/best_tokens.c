/* Blocks of a row of logits, and the best tokens found by them: nothing is sorted. */
#include "best_tokens.h"

#include <float.h>
#include <omp.h>

#define PARTS 256 /* of a range of keys */
#define CHAINS 4  /* sums of a part that do not wait for each other */

static int64_t padded(int64_t vocabulary) { return (vocabulary / BLOCK + 2) * BLOCK; }

int64_t pawl_sampling_scratch_bytes(int64_t vocabulary) { return padded(vocabulary) * 8 * (int64_t)sizeof(float); }

Scratch scratch_of(char *memory, int64_t vocabulary) {
    int64_t n = padded(vocabulary);
    float *at = (float *)(memory + omp_get_thread_num() * pawl_sampling_scratch_bytes(vocabulary));
    float *small = at + 6 * n; /* [2n]: peaks and sums are a value per block */
    return (Scratch){at, small, at + n, at + 2 * n, at + 3 * n, at + 4 * n, (int32_t *)(at + 5 * n), (double *)(small + n)};
}

float find_peaks(const float *x, int64_t n, float *peaks, int *finite) {
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

/* A block's logits, or a copy filled up with -infinity where the row ends. */
INLINE const float *whole_block(const float *x, int64_t size, float *copy) {
    if (size == BLOCK) return x;
    memcpy(copy, x, (size_t)size * sizeof(float));
    for (int64_t i = size; i < BLOCK; i++) copy[i] = -INFINITY;
    return copy;
}

double weigh(const float *x, int64_t n, const float *peaks, float bound, float best, float inverse, float *weights) {
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

Cut find_cut(const float *keys, const float *weights, int64_t n, const float *peaks, float low, float high,
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

float lowest(const float *keys, int64_t n) {
    float low = INFINITY;
    for (int64_t i = 0; i < n; i++) low = keys[i] < low ? keys[i] : low;
    return low;
}

int64_t take_best(const float *x, int64_t n, const float *peaks, float best, int64_t k, const Scratch *s) {
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
