/* How probable tokens were, and which were the best beside them: as sampling.c, one thread a row. */
#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "best_tokens.h"

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
