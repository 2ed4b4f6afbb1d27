/* Weights into the panels that linear.c describes. */
#include <string.h>

#include "panels.h"

int64_t pawl_panel_width(void) { return WIDTH; }

/* w [n, k], rows of 4, 2 or 1 bytes by the format, and `skip` bytes from row to row -> panels; features past n are 0. */
void pawl_pack(const char *w, char *packed, int64_t n, int64_t k, int64_t skip, int32_t format, int32_t threads) {
    int64_t panels = (n + 2 * WIDTH - 1) / (2 * WIDTH) * 2, bytes = panel_bytes(format, k);
    int size = format == FLOAT ? 4 : format == BYTE ? 1 : 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++) {
        char *to = packed + panel * bytes;
        memset(to, 0, (size_t)bytes);
        for (int64_t c = 0; c < WIDTH && panel * WIDTH + c < n; c++) {
            const char *from = w + (panel * WIDTH + c) * skip;
            for (int64_t i = 0; i < k; i++) {
                int64_t at = format == BRAIN ? (i / 2 * WIDTH + c) * 2 + (i & 1) : i * WIDTH + c;
                memcpy(to + at * size, from + i * size, (size_t)size);
            }
        }
    }
}

/* w [n, k] bytes, scales [n, ceil(k / 2^shift)] -> panels of groups; features past n are 0. */
void pawl_pack_groups(const int8_t *w, const float *scales, char *packed, int64_t n, int64_t k, int32_t shift,
                      int32_t threads) {
    int64_t panels = (n + 2 * WIDTH - 1) / (2 * WIDTH) * 2, group = 1 << shift, groups = (k + group - 1) >> shift;
    int64_t bytes = panel_bytes(GROUPS, k) + scale_bytes(shift, k);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++) {
        char *to = packed + panel * bytes;
        memset(to, 0, (size_t)bytes);
        for (int64_t g = 0; g < groups; g++) {
            int64_t from = g * group, height = k - from < group ? k - from : group;
            for (int64_t c = 0; c < WIDTH && panel * WIDTH + c < n; c++) {
                int64_t feature = panel * WIDTH + c;
                memcpy(to + c * 4, scales + feature * groups + g, 4);
                for (int64_t i = 0; i < height; i++) to[WIDTH * 4 + i * WIDTH + c] = (char)w[feature * k + from + i];
            }
            to += WIDTH * 4 + height * WIDTH;
        }
    }
}
