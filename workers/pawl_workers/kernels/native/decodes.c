/* The arrays of a decode step become those of the next one: a few words each, which in Python are a dozen calls, whose
   code has left the cache since the last step. */
#include "decodes.h"

#include <string.h>

#include "attention.h"

static int can_move(const Decodes *d) {
    for (int64_t i = 0; i < d->count; i++) {
        int64_t position = d->positions[i] + 1;
        if (position >= d->capacity[i] || position >= d->table_stride * BLOCK || position % SPLIT == 0) return 0;
    }
    return 1;
}

/* Each sequence has computed its token, and these are known to follow. */
void pawl_note(const Decodes *d, const int64_t *token_ids) {
    for (int64_t i = 0; i < d->count; i++) {
        int64_t row = d->rows[i];
        d->known[row * d->known_stride + d->num_tokens[row]++] = (int32_t)token_ids[i];
        d->num_computed[row]++;
    }
}

/* Nothing changes where `moved` becomes 0. */
void pawl_move_on(Decodes *d) {
    d->moved = can_move(d);
    for (int64_t i = 0; d->moved && i < d->count; i++) {
        int64_t position = ++d->positions[i];
        d->token_ids[i] = d->known[d->rows[i] * d->known_stride + position];
        d->slots[i] = d->tables[i * d->table_stride + position / BLOCK] * BLOCK + position % BLOCK;
        d->sampled_at[i]++, d->num_output[i]++;
        for (int64_t r = 0; r < d->num_rotaries; r++) {
            int64_t n = d->turned[r];
            memcpy(d->cosines[r] + i * n, d->all_cosines[r] + position * n, (size_t)n * sizeof(float));
            memcpy(d->sines[r] + i * n, d->all_sines[r] + position * n, (size_t)n * sizeof(float));
        }
    }
    for (int64_t tile = 0; d->moved && tile < d->num_tiles; tile++) d->tiles[tile * TILE_FIELDS + FIRST_POSITION]++;
}
