/* A head's weights into the bytes that screen.c multiplies, with the length of what is rounded off. */
#include "screen.h"
#include "screen_bytes.h"

int64_t pawl_screen_weight_bytes(int64_t n, int64_t k) { return panels_in(n) * panel_size(k); }

int64_t pawl_screen_columns(int64_t n) { return panels_in(n) * 3 * WIDTH; }

/* w [n, k], which follow `first` features, a multiple of WIDTH -> their weights and columns as Screen says, and behind the
   last ones of a panel zeros. *odd: how many weights are not finite or too large to be bounded. */
void pawl_pack_screen(const float *w, uint8_t *weights, float *columns, int64_t first, int64_t n, int64_t k, int64_t *odd,
                      int32_t threads) {
    int64_t found = 0;
    weights += first / WIDTH * panel_size(k), columns += first * 3;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : found)
    for (int64_t feature = 0; feature < (n + WIDTH - 1) / WIDTH * WIDTH; feature++) {
        int64_t panel = feature / WIDTH, c = feature % WIDTH;
        uint8_t *to = weights + panel * panel_size(k) + c * 4;
        float *column = columns + panel * 3 * WIDTH + c;
        const float *from = w + feature * k;
        float most = 0.0f;
        double length = 0.0, left = 0.0;
        for (int64_t i = 0; feature < n && i < k; i++) {
            most = fmaxf(most, fabsf(from[i]));
            found += !(fabsf(from[i]) <= LARGEST);
        }
        float scale = most / MOST_WEIGHT;
        for (int64_t i = 0; i < fours_in(k) * 4; i++) {
            float value = feature < n && i < k ? from[i] : 0.0f;
            float byte = scale > 0.0f ? rintf(value / scale) : 0.0f;
            byte = fminf(fmaxf(byte, -MOST_WEIGHT), MOST_WEIGHT);
            double rest = (double)value - (double)scale * (double)byte;
            length += (double)value * (double)value, left += rest * rest;
            to[i / 4 * WIDTH * 4 + i % 4] = (uint8_t)(MIDDLE + (int)byte);
        }
        column[0] = scale;
        column[WIDTH] = not_below(sqrt(length) * (1.0 + 1e-9));
        column[2 * WIDTH] = not_below(sqrt(left) * (1.0 + 1e-9));
    }
    *odd += found;
}
