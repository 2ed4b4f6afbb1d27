/* Some rows of a tile and a split of the keys: scores, weights, and the sums of values. See attention.c. */
#include "attention_tile.h"
#include "linear.h"
#include "softmax.h"

void open_split(const Tile *t, int64_t first_key, Ahead then, Split *split) {
    const Attention *step = t->step;
    int64_t count = smaller(t->num_keys - first_key, SPLIT);
    split->first_key = first_key, split->wide_keys = split->wide_values = 0;
    split->scaled = step->format == BYTE, split->widened = step->format != FLOAT && passes_of(t->rows) > 1;
    for (int64_t i = 0; i * BLOCK < count; i++) {
        int64_t at = block_offset(t, first_key + i * BLOCK);
        split->keys[i] = step->keys + at, split->values[i] = step->values + at;
        split->key_scales[i] = (const float *)(split->keys[i] + step->padded * BLOCK);
        split->value_scales[i] = (const float *)(split->values[i] + step->padded * BLOCK);
    }
    for (int i = 0; i < MOST_AHEAD; i++)
        split->then.blocks[i] = then.blocks[i] ? then.blocks[i] : split->values[(count - 1) / BLOCK];
}

static void widen(const Tile *t, const char **block, float *to) {
    const Attention *step = t->step;
    for (int64_t i = 0; i < step->padded * BLOCK; i += WIDTH)
        storew(to + i, step->format == HALF ? halfw((const uint16_t *)*block + i) : bytew((const int8_t *)*block + i));
    *block = (const char *)to;
}

/* Widens those blocks up to `end` that are not yet. For a single group over each other, in the first-level cache. */
static void widen_up_to(const Tile *t, int64_t start, int64_t end, int64_t *done, const char **blocks, float *memory) {
    for (int64_t key = larger(start, *done); key < end; key += BLOCK) {
        int64_t slot = t->groups == 1 ? key % VALUES_AT_ONCE : key;
        widen(t, &blocks[key / BLOCK], memory + slot * t->step->padded);
        *done = key + BLOCK;
    }
}

INLINE void prefetch(const void *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i, 0, 2);
}

/* The values that are taken next, or what is read after the last of them. */
static void prefetch_values(const Split *split, int64_t key, int64_t end, int64_t bytes) {
    if (key >= end) prefetch(split->then.blocks[0], bytes);
    for (int64_t until = smaller(key + VALUES_AT_ONCE, end); key < until; key += BLOCK)
        prefetch(split->values[key / BLOCK], bytes);
}

static void take_queries(const Tile *t, Scratch *s, int first, int rows) {
    const Attention *step = t->step;
    for (Query query = query_of(t, first); query.row < first + rows; next_query(t, &query)) {
        const float *q = step->q + offset_of(t, query);
        float *to = s->group.queries[query.row - first];
        for (int64_t dim = 0; dim < step->head_dim; dim++) to[dim] = q[dim] * step->scale;
        for (int64_t dim = step->head_dim; dim < step->padded; dim++) to[dim] = 0.0f;
    }
}

INLINE void cap(float *scores, int64_t from, int64_t to, float softcap) {
    v8 most = all8(softcap);
    for (int64_t i = from; i < to; i += LANES) store8(scores + i, most * tanh8(load8(scores + i) / most));
}

/* The scores [start, end) of a group become weights, 0 those of keys that a row does not see. */
static void weigh(const Tile *t, Scratch *s, const Split *split, int first, int rows, int64_t start, int64_t end) {
    const Attention *step = t->step;
    const float *const *scales = split->scaled ? split->value_scales : NULL;
    end = (end + STEP - 1) / STEP * STEP;
    for (Query query = query_of(t, first); query.row < first + rows; next_query(t, &query)) {
        int64_t seen = visible(t, query) - split->first_key;
        float *scores = s->group.scores[query.row - first];
        if (step->softcap != 0.0f) cap(scores, start, end, step->softcap);
        hide(scores, start, end, seen - step->window, seen);
    }
#define WEIGH(count)                                                                                               \
    if (scales) weigh_rows(count, s->group.scores[row], SCORE_STRIDE, start, end, scales, BLOCK,                   \
                           s->split_maximum + row, s->split_total + row);                                          \
    else weigh_rows(count, s->group.scores[row], SCORE_STRIDE, start, end, NULL, BLOCK, s->split_maximum + row,    \
                    s->split_total + row);
    int row = 0;
    for (; row + 4 <= rows; row += 4) { WEIGH(4) }
    switch (rows - row) {
        case 3: WEIGH(3) break;
        case 2: WEIGH(2) break;
        case 1: WEIGH(1) break;
        default: break;
    }
#undef WEIGH
}

void attend_group(const Tile *t, Scratch *s, Split *split, int first, int rows) {
    const Attention *step = t->step;
    int64_t dims = step->padded, bytes = cache_bytes(step->format, dims);
    int64_t end = smaller(visible(t, query_of(t, first + rows - 1)) - split->first_key, SPLIT);
    int64_t start = larger(visible(t, query_of(t, first)) - step->window - split->first_key, 0) / BLOCK * BLOCK;
    int format = split->widened ? FLOAT : step->format;
    if (start >= end) { /* other groups of the tile see keys of this split */
        for (int row = 0; row < rows; row++) {
            memset(s->group.sums[row], 0, (size_t)dims * sizeof(float));
            s->split_maximum[row] = -INFINITY, s->split_total[row] = 0.0f;
        }
        return;
    }
    take_queries(t, s, first, rows);
    int reads = first == 0; /* before other groups of the tile do */
    int64_t blocks = (end - start + BLOCK - 1) / BLOCK;
    int64_t far = smaller(format == BYTE ? MOST_AHEAD : 1, blocks);
    for (int64_t key = start; key < end; key += BLOCK) {
        int64_t i = key / BLOCK;
        const char *ahead = key + far * BLOCK < end ? split->keys[i + far] : split->values[i + far - blocks];
        if (reads && split->scaled) {
            prefetch(split->value_scales[i], BLOCK * 4);
            prefetch(ahead + dims * BLOCK, BLOCK * 4);
        }
        if (split->widened) {
            widen_up_to(t, start, key + BLOCK, &split->wide_keys, split->keys, s->keys);
            if (reads) prefetch(ahead, bytes);
        }
        score_block(&s->group, rows, format, split->keys[i], split->scaled ? split->key_scales[i] : NULL, dims, key,
                    end - key, reads && !split->widened ? ahead : NULL);
    }
    weigh(t, s, split, first, rows, start, end);
    int64_t at_once = passes_of(rows) > 1 ? VALUES_AT_ONCE : SPLIT;
    for (int64_t key = start; key < end; key += at_once) {
        int64_t until = smaller(key + at_once, end);
        const char *const *then = until < end ? split->values + until / BLOCK : split->then.blocks;
        if (split->widened) {
            widen_up_to(t, key, until, &split->wide_values, split->values, s->values);
            if (reads) prefetch_values(split, until, end, bytes);
        }
        add_values(&s->group, rows, format, split->values, dims, key, until, key == start,
                   reads && !split->widened ? then : NULL, far);
    }
}
