/* Products of a few query rows with keys and values, in registers. See attention_rows.c. */
#ifndef PAWL_ATTENTION_ROWS_H
#define PAWL_ATTENTION_ROWS_H

#include "attention.h"

#define GROUP_ROWS 12 /* query rows whose scores for a split stay in the first-level cache */
#define VALUES_AT_ONCE 64 /* keys whose values stay there in several passes */
#define SPLIT_BLOCKS (SPLIT / BLOCK)
#define MOST_AHEAD 3 /* blocks from the one that is computed with to the one that is fetched */

/* From row to row: no power of 2, since the first-level cache keeps few lines that lie so far apart. */
#define DIM_STRIDE (MOST_DIM + 16)
#define SCORE_STRIDE (SPLIT + 16)

typedef struct {
    float queries[GROUP_ROWS][DIM_STRIDE], scores[GROUP_ROWS][SCORE_STRIDE], sums[GROUP_ROWS][DIM_STRIDE];
} Rows;

/* Passes over keys and values that so many rows take; more than one, and they are better widened before. */
int passes_of(int rows);

/* scores[.][key ..) = the products of the queries with the first num_keys of a block, of which 16 or 32 are computed;
   times the keys' scales, if there are any. `ahead`: the block that is read next, which is fetched meanwhile; or NULL. */
void score_block(Rows *r, int rows, int format, const char *keys, const float *scales, int64_t dims, int64_t key,
                 int64_t num_keys, const char *ahead);

/* sums += the weights that stand in scores[.][start .. end) times these keys' values, in order; first: from 0 on. `then`:
   the blocks that are read after those; each is fetched while the one `far` blocks before it is computed with; or NULL, and
   none is. */
void add_values(Rows *r, int rows, int format, const char *const *blocks, int64_t dims, int64_t start, int64_t end,
                int first, const char *const *then, int64_t far);

#endif
