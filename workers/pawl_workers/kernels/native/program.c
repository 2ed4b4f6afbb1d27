/* A program: what layers of a model do in one step, in one parallel region, and each operation once the one before it is done.

   The operations are those of linear.c, attention.c, elementwise.c and experts.c, with the same bits. What stays from
   step to step (weights, sizes, the cache) is in an operation; what changes (rows, buffers, tables) in the frame. */
#include <omp.h>
#include <string.h>

#include "attention.h"
#include "decodes.h"
#include "elementwise.h"
#include "experts.h"
#include "fetch.h"
#include "linear.h"
#include "progress.h"
#include "screen.h"

#define NUM_BUFFERS 15

enum { NORM = 0, LINEAR = 1, PLACE = 2, ATTEND = 3, MERGE = 4, GROUP = 5, GATHER = 6, UP = 7, DOWN = 8, COMBINE = 9, EMBED = 10,
       SCORE = 11, QUANTISE = 12, SCREEN = 13, CHOOSE = 14 };
#define NUM_KINDS 15
enum { GATHERED = 9, EXPERT_HIDDEN = 10, EXPERT_FOUND = 11, SHARED_FOUND = 12 }; /* buffers of routed layers */

typedef struct {
    int32_t kind;
    int32_t from, to; /* buffers of the frame: what is read and what is written */
    int32_t rotary;   /* of PLACE; -1: none */
    union {
        Embedding embedding;
        Norm norm;
        Linear linear;
        Place place;
        Attention attention;
        Experts experts;
        Screen screen;
    };
} Operation;

typedef struct {
    float *buffers[NUM_BUFFERS];
    const float *cosines[MOST_ROTARIES], *sines[MOST_ROTARIES]; /* [rows, turned] */
    const int64_t *token_ids, *positions;                       /* of EMBED, [rows] */
    const int64_t *slots, *tables, *tiles, *pairs;              /* as in elementwise.h and attention.h */
    float *partials;
    Progress *progress;    /* of each operation */
    char *scratch;         /* threads times scratch_bytes */
    const int64_t *chosen; /* as in experts.h, of the one routed layer that is run */
    const float *shares, *shared_shares;
    char *routing; /* memory of the routing */
    char *screened;  /* memory of what bounds the logits */
    int64_t *chosen_tokens;
    double *seconds;       /* of the first thread, [2][NUM_KINDS]: its work and its waits for the others; or NULL */
    int64_t turned[MOST_ROTARIES]; /* dimensions of a head that turn */
    int64_t rows, num_tiles, num_pairs, table_stride, scratch_bytes;
} Frame;

static void run_experts(const Operation *o, const Frame *f, int64_t *next, int32_t threads, float *wide) {
    Routing routing = {f->chosen, f->shares, f->routing, f->buffers[o->from], f->buffers[GATHERED],
                       f->buffers[EXPERT_HIDDEN], f->buffers[EXPERT_FOUND], f->buffers[o->to],
                       f->buffers[SHARED_FOUND], f->shared_shares, f->rows};
    switch (o->kind) {
        case GROUP: group_rows(&o->experts, &routing, next); break;
        case GATHER: gather_part(&o->experts, &routing, next); break;
        case UP: up_part(&o->experts, &routing, threads, wide); break;
        case DOWN: down_part(&o->experts, &routing, threads, wide); break;
        default: combine_part(&o->experts, &routing, next);
    }
}

static Attention attention_of(const Operation *o, const Frame *f) {
    Attention attention = o->attention;
    attention.q = f->buffers[o->from], attention.out = f->buffers[o->to];
    attention.tables = f->tables, attention.tiles = f->tiles, attention.pairs = f->pairs;
    attention.partials = f->partials, attention.num_tiles = f->num_tiles, attention.num_pairs = f->num_pairs;
    attention.table_stride = f->table_stride;
    return attention;
}

/* What a thread fetches until the next attention, from operation `i` on; `at` becomes that of the attention. For few rows
   nobody would ask for it. */
static Fetch fetch_from(const Operation *operations, int64_t i, int64_t count, const Frame *f, int32_t threads, int64_t *at) {
    if (f->rows <= linear_tile_rows()) i = count;
    while (i < count && operations[i].kind != ATTEND) i++;
    *at = i;
    if (i == count) return fetch_for(NULL, 0, threads);
    Attention coming = attention_of(&operations[i], f);
    return fetch_for(&coming, omp_get_thread_num(), threads);
}

static void run(const Operation *o, const Frame *f, int64_t *next, int32_t threads, char *scratch, Fetch *fetch) {
    float *from = f->buffers[o->from], *to = f->buffers[o->to];
    switch (o->kind) {
        case EMBED: embed_part(&o->embedding, f->token_ids, f->positions, to, f->rows, next, threads); break;
        case NORM: {
            Norm norm = o->norm;
            norm.x = from, norm.y = to, norm.rows = f->rows;
            norm_part(&norm, next, threads);
            break;
        }
        case LINEAR:
        case SCORE: {
            Linear linear = o->linear;
            linear.x = from, linear.y = to, linear.m = f->rows;
            linear_part(&linear, next, threads, (float *)scratch, fetch);
            break;
        }
        case PLACE: {
            Place place = o->place;
            place.heads = from, place.q = to, place.rows = f->rows, place.slots = f->slots;
            place.cosines = o->rotary < 0 ? NULL : f->cosines[o->rotary];
            place.sines = o->rotary < 0 ? NULL : f->sines[o->rotary];
            place.turned = o->rotary < 0 ? 0 : f->turned[o->rotary];
            place_part(&place, next, threads);
            break;
        }
        case ATTEND:
        case MERGE: {
            Attention attention = attention_of(o, f);
            if (o->kind == ATTEND) attention_part(&attention, next, scratch);
            else merge_part(&attention, next, scratch);
            break;
        }
        case QUANTISE:
        case SCREEN: {
            Screened screened = screened_of(f->screened, f->rows, o->screen.k, o->screen.n);
            if (o->kind == QUANTISE) quantise_part(&o->screen, from, f->rows, &screened, next);
            else screen_part(&o->screen, f->rows, &screened, next);
            break;
        }
        case CHOOSE: {
            Linear linear = o->linear;
            linear.x = from, linear.m = f->rows;
            Screened screened = screened_of(f->screened, f->rows, linear.k, linear.n);
            choose_part(&linear, &screened, f->chosen_tokens, next, threads, (float *)scratch);
            break;
        }
        default: run_experts(o, f, next, threads, (float *)scratch);
    }
}

/* Operations in order; a MERGE is passed over where no tile's splits were shared out. */
void pawl_run(const Operation *operations, int64_t num_operations, const Frame *frame, int32_t threads) {
    memset(frame->progress, 0, (size_t)num_operations * sizeof(Progress));
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num();
        char *scratch = frame->scratch + thread * frame->scratch_bytes;
        double *seconds = thread == 0 ? frame->seconds : NULL, before = seconds ? omp_get_wtime() : 0.0;
        int64_t attends;
        Fetch fetch = fetch_from(operations, 0, num_operations, frame, threads, &attends);
        for (int64_t i = 0; i < num_operations; i++) {
            if (i > attends) fetch = fetch_from(operations, i, num_operations, frame, threads, &attends);
            if (operations[i].kind == MERGE && !frame->pairs) continue;
            enter_operation(frame->progress + i);
            run(&operations[i], frame, &frame->progress[i].next, threads, scratch, &fetch);
            leave_operation(frame->progress + i);
            double done = seconds ? omp_get_wtime() : 0.0;
            wait_until_done(frame->progress + i);
            if (seconds) {
                double now = omp_get_wtime();
                seconds[operations[i].kind] += done - before;
                seconds[NUM_KINDS + operations[i].kind] += now - done;
                before = now;
            }
        }
    }
}

int64_t pawl_program_scratch_bytes(int64_t widest) {
    int64_t wide = linear_wide_bytes(widest), tile = attention_scratch_bytes();
    return ((wide > tile ? wide : tile) + 63) / 64 * 64;
}

int64_t pawl_routing_bytes(int64_t tokens, int64_t num_experts, int64_t num_active) {
    return routing_bytes(tokens, num_experts, num_active);
}

/* Sizes that Python's copies of the structures are checked against. */
void pawl_structure_sizes(int64_t *sizes) {
    sizes[0] = sizeof(Norm), sizes[1] = sizeof(Linear), sizes[2] = sizeof(Place), sizes[3] = sizeof(Attention);
    sizes[4] = sizeof(Operation), sizes[5] = sizeof(Frame), sizes[6] = sizeof(Experts);
    sizes[7] = sizeof(Decodes), sizes[8] = sizeof(Progress);
    sizes[9] = sizeof(Screen), sizes[10] = sizeof(Embedding);
}
