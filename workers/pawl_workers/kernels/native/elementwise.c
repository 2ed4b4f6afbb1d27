/* What lies between the products: vectors of tokens, norms, rotation, gates. Every row by itself, every sum in a fixed order. */
#include "elementwise.h"

#include <omp.h>

#include "attention.h"
#include "ends.h"
#include "linear.h"
#include "vector.h"

/* Rows that a thread takes at a time, from the end that its linear layers come from; of many, whole blocks, so that no two
   threads write the same lines of the cache. */
INLINE int64_t take_rows(int64_t *next, int64_t rows, int32_t threads, int64_t *end) {
    int64_t chunk = rows / (threads * 4) + 1;
    if (chunk > BLOCK) chunk = chunk / BLOCK * BLOCK;
    int64_t item = take_item(next, (rows + chunk - 1) / chunk, 0, omp_get_thread_num());
    if (item < 0) return rows;
    *end = smaller((item + 1) * chunk, rows);
    return item * chunk;
}

/* x = scale * the token's vector, and the position's added where there is one: two roundings, as the stage has. */
INLINE void embed_row(const Embedding *w, int64_t token_id, const float *position, float *x) {
    int64_t n = w->n, i = 0;
    const float *floats = (const float *)w->vectors + token_id * n;
    const uint16_t *halves = (const uint16_t *)w->vectors + token_id * n;
    switch (w->format) {
        case FLOAT: memcpy(x, floats, (size_t)n * sizeof(float)); break;
        case HALF:
            for (; i + LANES <= n; i += LANES) store8(x + i, half8(halves + i));
            if (i < n) {
                uint16_t rest[LANES] = {0};
                memcpy(rest, halves + i, (size_t)(n - i) * sizeof *rest);
                v8 values = half8(rest);
                memcpy(x + i, &values, (size_t)(n - i) * sizeof(float));
            }
            break;
        default:
            for (; i < n; i++) {
                uint32_t bits = (uint32_t)halves[i] << 16;
                memcpy(x + i, &bits, sizeof bits);
            }
    }
    if (w->scale != 1.0f)
        for (i = 0; i < n; i++) x[i] *= w->scale;
    if (position)
        for (i = 0; i < n; i++) x[i] += position[i];
}

void embed_part(const Embedding *w, const int64_t *token_ids, const int64_t *positions, float *x, int64_t rows,
                int64_t *next, int32_t threads) {
    for (int64_t end, row; (row = take_rows(next, rows, threads, &end)) < rows;)
        for (; row < end; row++)
            embed_row(w, token_ids[row], w->positions ? w->positions + positions[row] * w->n : 0, x + row * w->n);
}

/* y = x / rms(x) * weight. Source: Zhang and Sennrich, 2019. */
INLINE void rms_norm(const float *x, const float *weight, float *y, int64_t n, float epsilon, int added, float factor) {
    v8 squares = all8(0.0f);
    float rest = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) squares = fma8(load8(x + i), load8(x + i), squares);
    for (; i < n; i++) rest += x[i] * x[i];
    float scale = 1.0f / sqrtf((sum8(squares) + rest) / (float)n + epsilon);
    for (i = 0; i + LANES <= n; i += LANES) put8(y + i, load8(x + i) * all8(scale) * load8(weight + i), added, factor);
    for (; i < n; i++) put(y + i, x[i] * scale * weight[i], added, factor);
}

/* y = (x - mean) / deviation * weight + bias. Source: Ba, Kiros, Hinton, 2016. */
INLINE void layer_norm(const float *x, const float *weight, const float *bias, float *y, int64_t n, float epsilon,
                       int added, float factor) {
    v8 total = all8(0.0f), squares = all8(0.0f);
    float rest = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) total += load8(x + i);
    for (; i < n; i++) rest += x[i];
    float mean = (sum8(total) + rest) / (float)n;
    rest = 0.0f;
    for (i = 0; i + LANES <= n; i += LANES) {
        v8 distance = load8(x + i) - all8(mean);
        squares = fma8(distance, distance, squares);
    }
    for (; i < n; i++) rest += (x[i] - mean) * (x[i] - mean);
    float scale = 1.0f / sqrtf((sum8(squares) + rest) / (float)n + epsilon);
    for (i = 0; i + LANES <= n; i += LANES) {
        v8 value = (load8(x + i) - all8(mean)) * all8(scale) * load8(weight + i);
        put8(y + i, bias ? value + load8(bias + i) : value, added, factor);
    }
    for (; i < n; i++) put(y + i, (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0.0f), added, factor);
}

void norm_part(const Norm *w, int64_t *next, int32_t threads) {
    for (int64_t end, row; (row = take_rows(next, w->rows, threads, &end)) < w->rows;)
        for (; row < end; row++) {
            const float *x = w->x + row * w->n;
            float *y = w->y + row * w->n;
            if (w->kind == RMS_NORM) rms_norm(x, w->weight, y, w->n, w->epsilon, w->added, w->factor);
            else layer_norm(x, w->weight, w->bias, y, w->n, w->epsilon, w->added, w->factor);
        }
}

/* The nearest half, ties to even; what is too large for one becomes the largest, so that the cache stays finite. */
INLINE void to_halves(const float *x, uint16_t *to, int64_t n, int64_t step) {
    int64_t i = 0;
#if defined(__F16C__)
    uint16_t some[LANES];
    for (; i + LANES <= n; i += LANES) {
        v8 value = max8(min8(load8(x + i), all8(65504.0f)), all8(-65504.0f));
        _mm_storeu_si128((__m128i *)some, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
        for (int lane = 0; lane < LANES; lane++) to[(i + lane) * step] = some[lane];
    }
#endif
    for (; i < n; i++) {
        float value = x[i] > 65504.0f ? 65504.0f : x[i] < -65504.0f ? -65504.0f : x[i];
        uint32_t bits, sign;
        memcpy(&bits, &value, sizeof bits);
        sign = bits >> 16 & 0x8000;
        bits &= 0x7fffffff;
        if (bits < 0x38800000) { /* below the least normal half: a multiple of 2^-24 */
            float scaled = 0.0f;
            memcpy(&scaled, &bits, sizeof bits);
            to[i * step] = (uint16_t)(sign | (uint32_t)rintf(scaled * 0x1p24f));
            continue;
        }
        bits += 0xfff + (bits >> 13 & 1); /* the carry may reach the exponent, as it should */
        to[i * step] = (uint16_t)(sign | ((bits - 0x38000000) >> 13));
    }
}

/* Bytes with one scale, by which the largest becomes 127. Returns the scale. */
INLINE float to_bytes(const float *x, int8_t *to, int64_t n, int64_t step) {
    float largest = 0.0f;
    for (int64_t i = 0; i < n; i++) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    if (!(largest > 0.0f && largest <= 3e38f)) { /* what is not finite fails its own sequence: the cache stays finite */
        for (int64_t i = 0; i < n; i++) to[i * step] = 0;
        return 0.0f;
    }
    float factor = 127.0f / largest;
    for (int64_t i = 0; i < n; i++) to[i * step] = x[i] == x[i] ? (int8_t)rintf(x[i] * factor) : 0;
    return largest / 127.0f;
}

/* with_key: 0 where its key is written with others, of FLOAT. */
INLINE void write_token(const Place *w, const float *key, const float *value, char *keys, char *values, int64_t at,
                        int with_key) {
    int64_t dims = w->head_dim;
    switch (w->format) {
        case FLOAT:
            for (int64_t i = 0; i < dims && with_key; i++) ((float *)keys)[i * BLOCK + at] = key[i];
            memcpy((float *)values + at * w->padded, value, (size_t)dims * sizeof(float));
            break;
        case HALF:
            to_halves(key, (uint16_t *)keys + at, dims, BLOCK);
            to_halves(value, (uint16_t *)values + at * w->padded, dims, 1);
            break;
        default:
            ((float *)(keys + w->padded * BLOCK))[at] = to_bytes(key, (int8_t *)keys + at, dims, BLOCK);
            ((float *)(values + w->padded * BLOCK))[at] = to_bytes(value, (int8_t *)values + at * w->padded, dims, 1);
    }
}

static void place_row(const Place *w, int64_t row, int with_keys) {
    int64_t dims = w->head_dim, half = w->turned / 2, num_heads = w->heads_of_queries, kv_heads = w->kv_heads;
    float *at = w->heads + row * (num_heads + 2 * kv_heads) * dims, *first_key = at + num_heads * dims;
    const float *c = w->cosines ? w->cosines + row * w->turned : 0, *s = w->cosines ? w->sines + row * w->turned : 0;
    int64_t block = w->slots[row] / BLOCK, offset = w->slots[row] % BLOCK, bytes = cache_bytes(w->format, w->padded);
    if (w->query_norm && w->wide) {
        rms_norm(at, w->query_norm, at, num_heads * dims, w->epsilon, 0, 1.0f);
        rms_norm(first_key, w->key_norm, first_key, kv_heads * dims, w->epsilon, 0, 1.0f);
    }
    for (int64_t head = 0; head < num_heads + kv_heads; head++) {
        float *x = at + head * dims;
        if (w->query_norm && !w->wide)
            rms_norm(x, head < num_heads ? w->query_norm : w->key_norm, x, dims, w->epsilon, 0, 1.0f);
        for (int64_t i = 0; c && i < half; i++) {
            float low = x[i], high = x[half + i];
            x[i] = low * c[i] + high * s[i];
            x[half + i] = high * c[half + i] + low * s[half + i];
        }
    }
    memcpy(w->q + row * num_heads * dims, at, (size_t)(num_heads * dims) * sizeof(float));
    for (int64_t head = 0; head < kv_heads; head++) {
        int64_t to = (block * kv_heads + head) * bytes;
        const float *key = first_key + head * dims, *value = first_key + (kv_heads + head) * dims;
        write_token(w, key, value, w->keys + to, w->values + to, offset, with_keys);
    }
}

#if WIDTH == 16
/* 16 floats of each of 16 rows, `stride` apart, into columns, whole lines BLOCK apart. */
static void transpose(const float *from, int64_t stride, float *to) {
    __m512 a[WIDTH], b[WIDTH];
    for (int i = 0; i < WIDTH; i++) a[i] = _mm512_loadu_ps(from + i * stride);
    for (int i = 0; i < WIDTH; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < WIDTH; i += 4)
        for (int j = 0; j < 2; j++) {
            __m512d first = (__m512d)b[i + j], second = (__m512d)b[i + j + 2];
            a[i + 2 * j] = (__m512)_mm512_unpacklo_pd(first, second);
            a[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(first, second);
        }
    for (int i = 0; i < WIDTH; i += 8)
        for (int j = 0; j < 4; j++) {
            b[i + j] = _mm512_shuffle_f32x4(a[i + j], a[i + j + 4], 0x88);
            b[i + j + 4] = _mm512_shuffle_f32x4(a[i + j], a[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        _mm512_storeu_ps(to + j * BLOCK, _mm512_shuffle_f32x4(b[j], b[j + 8], 0x88));
        _mm512_storeu_ps(to + (j + 8) * BLOCK, _mm512_shuffle_f32x4(b[j], b[j + 8], 0xdd));
    }
}

/* Whether the keys of 16 rows from here on fill lines. */
static int fills_lines(const Place *w, int64_t row, int64_t end) {
    if (w->format != FLOAT || w->head_dim % WIDTH || row + WIDTH > end || w->slots[row] % WIDTH) return 0;
    for (int64_t i = 1; i < WIDTH; i++)
        if (w->slots[row + i] != w->slots[row] + i) return 0;
    return 1;
}

static void place_lines(const Place *w, int64_t row) {
    int64_t dims = w->head_dim, width = (w->heads_of_queries + 2 * w->kv_heads) * dims;
    int64_t block = w->slots[row] / BLOCK, offset = w->slots[row] % BLOCK, bytes = cache_bytes(w->format, w->padded);
    for (int64_t i = 0; i < WIDTH; i++) place_row(w, row + i, 0);
    for (int64_t head = 0; head < w->kv_heads; head++) {
        const float *keys = w->heads + row * width + (w->heads_of_queries + head) * dims;
        float *to = (float *)(w->keys + (block * w->kv_heads + head) * bytes) + offset;
        for (int64_t dim = 0; dim < dims; dim += WIDTH) transpose(keys + dim, width, to + dim * BLOCK);
    }
}
#endif

/* Source: Su et al., RoFormer, 2021, section 3.4; Henry et al., 2020 (query-key normalisation). */
void place_part(const Place *w, int64_t *next, int32_t threads) {
    for (int64_t end, row; (row = take_rows(next, w->rows, threads, &end)) < w->rows;)
        while (row < end) {
#if WIDTH == 16
            if (fills_lines(w, row, end)) {
                place_lines(w, row);
                row += WIDTH;
                continue;
            }
#endif
            place_row(w, row++, 1);
        }
}

void pawl_norm(const Norm *norm, int32_t threads) {
    int64_t next = 0;
#pragma omp parallel num_threads(threads) if (norm->rows * norm->n > 32768)
    norm_part(norm, &next, threads);
}

void pawl_place(const Place *place, int32_t threads) {
    int64_t next = 0, width = (place->heads_of_queries + 2 * place->kv_heads) * place->head_dim;
#pragma omp parallel num_threads(threads) if (place->rows * width > 32768)
    place_part(place, &next, threads);
}

/* hidden [rows, n], or, gated, [rows, 2n]: y [rows, n] = activation(first half) * second half. Source: Shazeer, 2020. */
void pawl_activate(const float *hidden, float *y, int64_t rows, int64_t n, int32_t kind, int32_t gated, int32_t threads) {
    int64_t width = gated ? 2 * n : n;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * n > 16384)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = hidden + row * width;
        float *to = y + row * n;
        for (int64_t i = 0; i < n; i += LANES) {
            int64_t lanes = n - i < LANES ? n - i : LANES;
            float some[2][LANES] = {{0}};
            memcpy(some[0], from + i, (size_t)lanes * sizeof(float));
            if (gated) memcpy(some[1], from + n + i, (size_t)lanes * sizeof(float));
            v8 value = activated(kind, load8(some[0]));
            store8(some[0], gated ? value * load8(some[1]) : value);
            memcpy(to + i, some[0], (size_t)lanes * sizeof(float));
        }
    }
}
