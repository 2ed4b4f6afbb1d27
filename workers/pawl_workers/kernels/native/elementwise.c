/* What lies between the products: norms, rotation, gates. Every row by itself, every sum in a fixed order. */
#include "vector.h"

#define BLOCK 32

/* x [rows, n] += add [rows, n] unless NULL; y = x / rms(x) * weight. Source: Zhang and Sennrich, 2019. */
void pawl_rms_norm(float *x, const float *add, const float *weight, float *y, int64_t rows, int64_t n, float epsilon,
                   int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * n > 32768)
    for (int64_t row = 0; row < rows; row++) {
        float *at = x + row * n, *to = y + row * n;
        v8 squares = all8(0.0f);
        float rest = 0.0f;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) {
            v8 value = load8(at + i);
            if (add) {
                value += load8(add + row * n + i);
                store8(at + i, value);
            }
            squares = fma8(value, value, squares);
        }
        for (; i < n; i++) {
            if (add) at[i] += add[row * n + i];
            rest += at[i] * at[i];
        }
        float scale = 1.0f / sqrtf((sum8(squares) + rest) / (float)n + epsilon);
        for (i = 0; i + LANES <= n; i += LANES) store8(to + i, load8(at + i) * all8(scale) * load8(weight + i));
        for (; i < n; i++) to[i] = at[i] * scale * weight[i];
    }
}

/* y = x / rms(x) * weight over n values; y may be x. */
INLINE void normalise(const float *x, const float *weight, float *y, int64_t n, float epsilon) {
    v8 squares = all8(0.0f);
    float rest = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) squares = fma8(load8(x + i), load8(x + i), squares);
    for (; i < n; i++) rest += x[i] * x[i];
    float scale = 1.0f / sqrtf((sum8(squares) + rest) / (float)n + epsilon);
    for (i = 0; i + LANES <= n; i += LANES) store8(y + i, load8(x + i) * all8(scale) * load8(weight + i));
    for (; i < n; i++) y[i] = x[i] * scale * weight[i];
}

/* heads [rows, H + 2K, head_dim], changed in place: normalises queries and keys (weights of head_dim, or of all heads
   when `wide`; NULL = not), turns their first `turned` dimensions by their angles (cosines and signed sines
   [rows, turned], or NULL), copies queries to q [rows, H, head_dim], and puts keys and values where the slots say:
   slot = block * 32 + offset; keys [blocks, K, padded, 32], values [blocks, K, 32, padded].
   Source: Su et al., RoFormer, 2021, section 3.4; Henry et al., 2020 (query-key normalisation). */
void pawl_turn_and_write(float *heads, const float *cosines, const float *sines, const float *query_norm,
                         const float *key_norm, float *q, float *keys, float *values, const int64_t *slots, int64_t rows,
                         int64_t num_heads, int64_t kv_heads, int64_t dims, int64_t turned, int64_t padded, float epsilon,
                         int32_t wide, int32_t threads) {
    int64_t half = turned / 2, width = (num_heads + 2 * kv_heads) * dims;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > 32768)
    for (int64_t row = 0; row < rows; row++) {
        float *at = heads + row * width, *first_key = at + num_heads * dims;
        const float *c = cosines ? cosines + row * turned : 0, *s = sines ? sines + row * turned : 0;
        int64_t block = slots[row] / BLOCK, offset = slots[row] % BLOCK;
        if (query_norm && wide) {
            normalise(at, query_norm, at, num_heads * dims, epsilon);
            normalise(first_key, key_norm, first_key, kv_heads * dims, epsilon);
        }
        for (int64_t head = 0; head < num_heads + kv_heads; head++) {
            float *x = at + head * dims;
            if (query_norm && !wide) normalise(x, head < num_heads ? query_norm : key_norm, x, dims, epsilon);
            for (int64_t i = 0; c && i < half; i++) {
                float low = x[i], high = x[half + i];
                x[i] = low * c[i] + high * s[i];
                x[half + i] = high * c[half + i] + low * s[half + i];
            }
        }
        memcpy(q + row * num_heads * dims, at, (size_t)(num_heads * dims) * sizeof(float));
        for (int64_t head = 0; head < kv_heads; head++) {
            const float *key = first_key + head * dims, *value = key + kv_heads * dims;
            float *to = keys + (block * kv_heads + head) * padded * BLOCK + offset;
            for (int64_t i = 0; i < dims; i++) to[i * BLOCK] = key[i];
            memcpy(values + ((block * kv_heads + head) * BLOCK + offset) * padded, value, (size_t)dims * sizeof(float));
        }
    }
}

/* silu(x) * up; the clamp keeps the exponential finite where its share is below the last bit. */
INLINE v8 gate8(v8 x, v8 up) { return x / (all8(1.0f) + exp8(min8(-x, all8(80.0f)))) * up; }

/* hidden [rows, 2n]: silu(first half) * second half -> y [rows, n]. Source: Shazeer, 2020 (SwiGLU). */
void pawl_silu_gate(const float *hidden, float *y, int64_t rows, int64_t n, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * n > 16384)
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = hidden + row * 2 * n, *up = gate + n;
        float *to = y + row * n;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) store8(to + i, gate8(load8(gate + i), load8(up + i)));
        if (i < n) {
            float last[3][LANES] = {{0}};
            memcpy(last[0], gate + i, (size_t)(n - i) * sizeof(float));
            memcpy(last[1], up + i, (size_t)(n - i) * sizeof(float));
            store8(last[2], gate8(load8(last[0]), load8(last[1])));
            memcpy(to + i, last[2], (size_t)(n - i) * sizeof(float));
        }
    }
}
