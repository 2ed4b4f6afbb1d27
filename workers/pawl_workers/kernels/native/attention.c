/* Paged attention that reads keys and values where they lie.

   Cache of a layer: keys [blocks, K, padded, 32] (transposed inside a block), values [blocks, K, 32, padded], in fp32,
   in fp16, or in bytes, where 32 scales (fp32, one per token) follow the bytes of each block and head.
   Keys are taken in splits at fixed absolute positions, each by itself, and merged in order; inside a split every sum
   runs over the keys in order. A hidden key weighs exactly 0, which changes no sum. So the bits of a query's result
   depend on its own sequence alone: not on the batch, the chunk, the tile it is computed in, or the number of threads.

   The rows of a tile are taken in groups, whose scores for a split stay in the first-level cache. A block of fewer bits
   is widened once for all of them, unless one pass over it in registers is enough.

   What decodes read lies in blocks all over memory, where no processor finds the next one by itself. So each block is
   fetched while the one before it is computed with, or, of bytes, of which one is no long way ahead, one before that: keys,
   then values of a split, then the next split's or tile's keys.

   Source: Dao et al., "FlashAttention", 2022, for the tiling; Hong et al., "FlashDecoding++", 2023, for splits in
   parallel. */
#include "attention.h"

#include <omp.h>

#include "attention_rows.h"
#include "linear.h"
#include "softmax.h"
#include "vector.h"

typedef struct {
    Rows group;
    float split_maximum[GROUP_ROWS], split_total[GROUP_ROWS];
    float maximum[MOST_ROWS], total[MOST_ROWS]; /* of all rows of a tile, and their sums, [rows][padded] */
    _Alignas(64) float sums[MOST_ROWS * MOST_DIM];
    _Alignas(64) float keys[SPLIT * MOST_DIM], values[SPLIT * MOST_DIM]; /* of a split, widened */
} Scratch;

/* What the rows of a tile share. */
typedef struct {
    const Attention *step;
    const int64_t *table;
    int64_t head, first_head, heads, first_row, first_position, num_keys;
    int rows, groups;
} Tile;

/* The first blocks of some keys, which are fetched before they are read; NULL: none. */
typedef struct {
    const char *blocks[MOST_AHEAD];
} Ahead;

/* What they share in a split: its blocks, in fp32 once they are widened, and up to where they are. */
typedef struct {
    int64_t first_key, wide_keys, wide_values;
    const char *keys[SPLIT_BLOCKS], *values[SPLIT_BLOCKS];
    const float *key_scales[SPLIT_BLOCKS], *value_scales[SPLIT_BLOCKS];
    Ahead then; /* what is read after it */
    int scaled, widened;
} Split;

/* A row of a tile, counted on without dividing. */
typedef struct {
    int row;
    int64_t token, head;
} Query;

INLINE Query query_of(const Tile *t, int row) { return (Query){row, row / t->heads, row % t->heads}; }

INLINE void next_query(const Tile *t, Query *query) {
    query->row++;
    if (++query->head == t->heads) query->head = 0, query->token++;
}

/* Keys up to and with its own. */
INLINE int64_t visible(const Tile *t, Query query) { return t->first_position + query.token + 1; }

/* In the queries and in what is found. */
INLINE int64_t offset_of(const Tile *t, Query query) {
    int64_t token = t->first_row + query.token, head = t->first_head + query.head;
    return (token * t->step->heads + head) * t->step->head_dim;
}

/* Of a key's block and the tile's head, bytes into the keys and into the values. */
INLINE int64_t block_offset(const Tile *t, int64_t key) {
    const Attention *step = t->step;
    return (t->table[key / BLOCK] * step->kv_heads + t->head) * cache_bytes(step->format, step->padded);
}

static Ahead keys_from(const Tile *t, int64_t key) {
    Ahead ahead;
    for (int i = 0; i < MOST_AHEAD; i++)
        ahead.blocks[i] = key + i * BLOCK < t->num_keys ? t->step->keys + block_offset(t, key + i * BLOCK) : NULL;
    return ahead;
}

static void open_split(const Tile *t, int64_t first_key, Ahead then, Split *split) {
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

/* A split for some rows of a tile, by itself: maximum, total, and what each of them gathers. */
static void attend_group(const Tile *t, Scratch *s, Split *split, int first, int rows) {
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

INLINE int group_start(const Tile *t, int group) { return group * t->rows / t->groups; }

static void begin(const Tile *t, Scratch *s, int row) {
    const Attention *step = t->step;
    memset(s->sums + row * step->padded, 0, (size_t)step->padded * sizeof(float));
    s->maximum[row] = -INFINITY, s->total[row] = 0.0f;
    if (!step->sinks) return;
    s->maximum[row] = step->sinks[t->first_head + row % t->heads];
    s->total[row] = 1.0f;
}

static void finish(const Tile *t, Query query, const float *sums, float total) {
    float *out = t->step->out + offset_of(t, query), share = 1.0f / total;
    for (int64_t i = 0; i < t->step->head_dim; i++) out[i] = sums[i] * share;
}

static Tile tile_of(const Attention *step, const int64_t *fields, int64_t head) {
    Tile t = {.step = step,
              .table = step->tables + fields[SEQUENCE] * step->table_stride,
              .head = head,
              .first_head = head * (step->heads / step->kv_heads) + fields[FIRST_HEAD],
              .heads = fields[HEADS],
              .first_row = fields[FIRST_ROW],
              .first_position = fields[FIRST_POSITION],
              .num_keys = fields[FIRST_POSITION] + fields[TOKENS],
              .rows = (int)(fields[TOKENS] * fields[HEADS])};
    t.groups = (t.rows + GROUP_ROWS - 1) / GROUP_ROWS;
    return t;
}

INLINE int64_t first_seen(const Tile *t) { return larger(t->first_position + 1 - t->step->window, 0); }

/* `then`: the keys that are read after it. What a single split gives is merged with nothing but sinks. */
static void attend_tile(const Tile *t, Scratch *s, Ahead then) {
    int64_t dims = t->step->padded, start = first_seen(t) / SPLIT * SPLIT;
    int alone = start + SPLIT >= t->num_keys && !t->step->sinks;
    for (int row = 0; row < t->rows && !alone; row++) begin(t, s, row);
    for (int64_t key = start; key < t->num_keys; key += SPLIT) {
        Split split;
        int64_t after = key + SPLIT;
        open_split(t, key, after < t->num_keys ? keys_from(t, after) : then, &split);
        for (int group = 0; group < t->groups; group++) {
            int first = group_start(t, group), rows = group_start(t, group + 1) - first;
            attend_group(t, s, &split, first, rows);
            Query query = query_of(t, first);
            for (int i = 0, row = first; i < rows; i++, row++, next_query(t, &query))
                if (alone) finish(t, query, s->group.sums[i], s->split_total[i]);
                else merge(&s->maximum[row], &s->total[row], s->sums + row * dims, s->split_maximum[i],
                           s->split_total[i], s->group.sums[i], dims);
        }
    }
    if (alone) return;
    for (Query query = {0}; query.row < t->rows; next_query(t, &query))
        finish(t, query, s->sums + query.row * dims, s->total[query.row]);
}

INLINE float *partial_of(const Attention *step, int64_t pair, int64_t head, int row) {
    return step->partials + ((pair * step->kv_heads + head) * MOST_PAIR_ROWS + row) * (step->padded + 2);
}

/* A partial is a row's maximum, total and sums of one split. */
static void attend_pair(const Tile *t, Scratch *s, int64_t pair, Ahead then) {
    const Attention *step = t->step;
    Split split;
    open_split(t, step->pairs[pair * 2 + 1] * SPLIT, then, &split);
    for (int group = 0; group < t->groups; group++) {
        int first = group_start(t, group), rows = group_start(t, group + 1) - first;
        attend_group(t, s, &split, first, rows);
        for (int i = 0; i < rows; i++) {
            float *partial = partial_of(step, pair, t->head, first + i);
            partial[0] = s->split_maximum[i], partial[1] = s->split_total[i];
            memcpy(partial + 2, s->group.sums[i], (size_t)step->padded * sizeof(float));
        }
    }
}

int64_t attention_scratch_bytes(void) { return ((int64_t)sizeof(Scratch) + 63) / 64 * 64; }

/* What a thread takes at a time: a tile, or one split of it. */
typedef struct {
    Tile tile;
    int64_t pair;
    Ahead first_keys;
} Item;

/* Takes an item if more than so many are left. taken: items from both ends, in its lower and its upper half. */
static int take(const Attention *step, int64_t *taken, int64_t left, Item *item) {
    int64_t items = (step->pairs ? step->num_pairs : step->num_tiles) * step->kv_heads;
    int64_t before = __atomic_load_n(taken, __ATOMIC_RELAXED), front, back;
    int last = from_the_last(omp_get_thread_num());
    do {
        front = before & 0xffffffff, back = before >> 32;
        if (front + back + left >= items) return 0;
    } while (!__atomic_compare_exchange_n(taken, &before, before + (last ? (int64_t)1 << 32 : 1), 1, __ATOMIC_RELAXED,
                                          __ATOMIC_RELAXED));
    int64_t i = last ? items - 1 - back : front;
    item->pair = i / step->kv_heads;
    int64_t tile = step->pairs ? step->pairs[item->pair * 2] : item->pair;
    item->tile = tile_of(step, step->tiles + tile * TILE_FIELDS, i % step->kv_heads);
    int64_t key = first_seen(&item->tile);
    if (step->pairs) key = larger(key, step->pairs[item->pair * 2 + 1] * SPLIT);
    item->first_keys = keys_from(&item->tile, key);
    return 1;
}

void attention_part(const Attention *step, int64_t *next, char *scratch) {
    Item item, after;
    int64_t others = omp_get_num_threads() - 1;
    int more = take(step, next, 0, &item);
    while (more) {
        more = take(step, next, others, &after); /* what the others would wait for is left to them */
        Ahead then = more ? after.first_keys : (Ahead){{NULL}};
        if (step->pairs) attend_pair(&item.tile, (Scratch *)scratch, item.pair, then);
        else attend_tile(&item.tile, (Scratch *)scratch, then);
        if (!more) more = take(step, next, 0, &after);
        item = after;
    }
}

void merge_part(const Attention *step, int64_t *next, char *scratch) {
    Scratch *s = (Scratch *)scratch;
    for (;;) {
        int64_t item = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (item >= step->num_tiles * step->kv_heads) return;
        const int64_t *fields = step->tiles + item / step->kv_heads * TILE_FIELDS;
        Tile t = tile_of(step, fields, item % step->kv_heads);
        for (int row = 0; row < t.rows; row++) {
            begin(&t, s, row);
            for (int64_t split = 0; split * SPLIT < t.num_keys; split++) {
                const float *partial = partial_of(step, fields[FIRST_PAIR] + split, t.head, row);
                merge(&s->maximum[row], &s->total[row], s->sums + row * step->padded, partial[0], partial[1],
                      partial + 2, step->padded);
            }
            finish(&t, query_of(&t, row), s->sums + row * step->padded, s->total[row]);
        }
    }
}

/* scratch: threads times pawl_scratch_bytes. */
void pawl_attend(const Attention *step, char *scratch, int32_t threads) {
    int64_t next[2] = {0, 0};
#pragma omp parallel num_threads(threads)
    {
        char *own = scratch + omp_get_thread_num() * attention_scratch_bytes();
        attention_part(step, &next[0], own);
        if (step->pairs) {
#pragma omp barrier
            merge_part(step, &next[1], own);
        }
    }
}

int64_t pawl_scratch_bytes(void) { return attention_scratch_bytes(); }
