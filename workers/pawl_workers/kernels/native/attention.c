/* Paged attention that reads keys and values where they lie.

   Cache of a layer: keys [blocks, K, padded, 32] (transposed inside a block), values [blocks, K, 32, padded], in fp32,
   in fp16, or in bytes, where 32 scales (fp32, one per token) follow the bytes of each block and head.
   Keys are taken in splits at fixed absolute positions, each by itself, and merged in order; inside a split every sum
   runs over the keys in order. A hidden key weighs exactly 0, which changes no sum. So the bits of a query's result
   depend on its own sequence alone: not on the batch, the chunk, the tile it is computed in, or the number of threads.

   The rows of a tile are taken in groups, whose scores for a split stay in the first-level cache. A block of fewer bits
   is widened once for all of them, unless one pass over it in registers is enough.

   What decodes read lies in blocks all over memory, where no processor finds the next one by itself. So each block is
   fetched while the one before it is computed with, or, of bytes, of which one is no long way ahead, the third before it:
   keys, then values of a split, then the next split's or tile's keys.

   Source: Dao et al., "FlashAttention", 2022, for the tiling; Hong et al., "FlashDecoding++", 2023, for splits in
   parallel. */
#include "attention.h"

#include <omp.h>

#include "attention_tile.h"
#include "ends.h"
#include "softmax.h"

static Ahead keys_from(const Tile *t, int64_t key) {
    Ahead ahead;
    for (int i = 0; i < MOST_AHEAD; i++)
        ahead.blocks[i] = key + i * BLOCK < t->num_keys ? t->step->keys + block_offset(t, key + i * BLOCK) : NULL;
    return ahead;
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

/* Takes an item if more than so many are left, from the end that a thread fetches from. */
static int take(const Attention *step, int64_t *taken, int64_t left, Item *item) {
    int64_t items = (step->pairs ? step->num_pairs : step->num_tiles) * step->kv_heads;
    int64_t i = take_item(taken, items, left, omp_get_thread_num());
    if (i < 0) return 0;
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
