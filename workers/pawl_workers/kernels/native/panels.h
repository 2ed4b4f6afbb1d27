/* Where the packed panels of a linear layer lie, and what becomes of its sums: scales, bias, activation, gate, residual. */
#ifndef PAWL_PANELS_H
#define PAWL_PANELS_H

#include "linear.h"
#include "vector.h"

typedef struct {
    const Linear *linear;
    int64_t odd_step, pair_step; /* bytes from an even panel to the odd one after it, and from pair to pair */
} Panels;

INLINE int64_t panel_bytes(int format, int64_t k) {
    return format == BRAIN ? (k + 1) / 2 * WIDTH * 4 : k * WIDTH * (format == FLOAT ? 4 : format == HALF ? 2 : 1);
}

INLINE Panels panels_of(const Linear *l, int64_t bytes) {
    int64_t half = (l->n / 2 / WIDTH) * bytes; /* gated: from the panel of gates to that of their factors */
    return (Panels){l, l->gated ? half : bytes, l->gated ? bytes : 2 * bytes};
}

INLINE void store_some(float *to, vw value, int64_t lanes) {
    if (lanes >= WIDTH) storew(to, value);
    else
        for (int64_t i = 0; i < lanes; i++) to[i] = value[i];
}

INLINE vw load_some(const float *from, int64_t lanes) {
    if (lanes >= WIDTH) return loadw(from);
    vw value = allw(0.0f);
    for (int64_t i = 0; i < lanes; i++) value[i] = from[i];
    return value;
}

INLINE vw finish(const Linear *l, vw sum, int64_t column, int64_t lanes) {
    if (l->format == BYTE) sum *= load_some(l->scales + column, lanes);
    return l->bias ? sum + load_some(l->bias + column, lanes) : sum;
}

/* Stores a tile whose first panel is `panel`; gated, pairs of panels give one of results. */
static void store_tile(const Linear *l, int rows, int panels, int64_t row, int64_t panel, const vw *sums) {
    for (int r = 0; r < rows; r++, sums += panels) {
        float *y = l->y + (row + r) * l->y_stride;
        if (l->gated) {
            for (int p = 0; p < panels; p += 2) {
                int64_t column = (panel + p) / 2 * WIDTH;
                vw gate = finish(l, sums[p], column, WIDTH), up = finish(l, sums[p + 1], l->n / 2 + column, WIDTH);
                storew(y + column, activatew(l->activation, gate) * up);
            }
            continue;
        }
        for (int p = 0; p < panels; p++) {
            int64_t column = (panel + p) * WIDTH, lanes = l->n - column;
            if (lanes <= 0) break;
            vw result = finish(l, sums[p], column, lanes);
            if (l->activation != NO_ACTIVATION) result = activatew(l->activation, result);
            if (l->added) {
                vw before = load_some(y + column, lanes);
                result = l->factor == 1.0f ? before + result : fmaw(allw(l->factor), result, before);
            }
            store_some(y + column, result, lanes);
        }
    }
}

#endif
