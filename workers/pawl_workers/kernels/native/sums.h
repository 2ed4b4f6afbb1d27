/* What becomes of the sums of a linear layer: scales, bias, activation, gate, residual. */
#ifndef PAWL_SUMS_H
#define PAWL_SUMS_H

#include "linear.h"
#include "vector.h"

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

/* Whether nothing is done to a sum but adding it. */
INLINE int is_plain(const Linear *l) {
    return !l->gated && !l->bias && l->format != BYTE && l->activation == NO_ACTIVATION;
}

static void store_plain(const Linear *l, int rows, int panels, float *y, const vw *sums) {
    for (int r = 0; r < rows; r++, y += l->y_stride, sums += panels)
        for (int p = 0; p < panels; p++) {
            vw result = sums[p];
            if (l->added) {
                vw before = loadw(y + p * WIDTH);
                result = l->factor == 1.0f ? before + result : fmaw(allw(l->factor), result, before);
            }
            storew(y + p * WIDTH, result);
        }
}

/* Stores a tile whose first panel is `panel`; gated, pairs of panels give one of results. */
static void store_tile(const Linear *l, int rows, int panels, int64_t row, int64_t panel, const vw *sums) {
    if (is_plain(l) && (panel + panels) * WIDTH <= l->n) {
        store_plain(l, rows, panels, l->y + row * l->y_stride + panel * WIDTH, sums);
        return;
    }
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
