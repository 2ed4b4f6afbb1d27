/* What this machine can do at most: fused multiply-adds in registers, products of matrix tiles, and reading from memory.

   Run as `machine READ_BYTES`, with OMP_NUM_THREADS set; prints JSON. Each figure is the best of several runs, since
   a limit is what can be reached, not what usually is. */
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { REPEATS = 7, CHAINS = 12 };
static const long ITERATIONS = 20000000;
static volatile float sink;

/* Independent chains hide the latency of an instruction; 12 of them fit the 16 registers of AVX2. Each has a name, since
   a compiler keeps an array of them in memory. */
#define START(SET)                                                                                                    \
    c0 = SET(0.0f), c1 = SET(1.0f), c2 = SET(2.0f), c3 = SET(3.0f), c4 = SET(4.0f), c5 = SET(5.0f), c6 = SET(6.0f),   \
    c7 = SET(7.0f), c8 = SET(8.0f), c9 = SET(9.0f), c10 = SET(10.0f), c11 = SET(11.0f)
#define ADVANCE(FMA)                                                                                                  \
    c0 = FMA(c0, scale, step), c1 = FMA(c1, scale, step), c2 = FMA(c2, scale, step), c3 = FMA(c3, scale, step);       \
    c4 = FMA(c4, scale, step), c5 = FMA(c5, scale, step), c6 = FMA(c6, scale, step), c7 = FMA(c7, scale, step);       \
    c8 = FMA(c8, scale, step), c9 = FMA(c9, scale, step), c10 = FMA(c10, scale, step), c11 = FMA(c11, scale, step);
#define TOTAL(FIRST)                                                                                                  \
    FIRST(c0) + FIRST(c1) + FIRST(c2) + FIRST(c3) + FIRST(c4) + FIRST(c5) + FIRST(c6) + FIRST(c7) + FIRST(c8) +       \
        FIRST(c9) + FIRST(c10) + FIRST(c11)
#define PEAK(NAME, TARGET, TYPE, SET, FMA, LANES, FIRST)                                                              \
    __attribute__((target(TARGET), noinline)) static float NAME##_chains(void)                                        \
    {                                                                                                                 \
        TYPE scale = SET(0.999f), step = SET(0.001f), START(SET);                                                     \
        for (long i = 0; i < ITERATIONS; i++) {                                                                       \
            ADVANCE(FMA)                                                                                              \
        }                                                                                                             \
        return TOTAL(FIRST);                                                                                          \
    }                                                                                                                 \
    static double NAME(void)                                                                                          \
    {                                                                                                                 \
        double best = 0;                                                                                              \
        for (int repeat = 0; repeat < REPEATS; repeat++) {                                                            \
            double started = omp_get_wtime(), threads = 0;                                                            \
            _Pragma("omp parallel reduction(+ : threads)")                                                            \
            {                                                                                                         \
                sink = NAME##_chains();                                                                               \
                threads += 1;                                                                                         \
            }                                                                                                         \
            double rate = threads * ITERATIONS * CHAINS * LANES * 2 / (omp_get_wtime() - started);                    \
            if (rate > best) best = rate;                                                                             \
        }                                                                                                             \
        return best;                                                                                                  \
    }

PEAK(peak_avx2, "avx2,fma", __m256, _mm256_set1_ps, _mm256_fmadd_ps, 8, _mm256_cvtss_f32)
PEAK(peak_avx512, "avx512f", __m512, _mm512_set1_ps, _mm512_fmadd_ps, 16, _mm512_cvtss_f32)

/* Compilers before these know no AMX. */
#if defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)

enum { TILE_CHAINS = 6, TILE_OPERATIONS = 2 * 16 * 16 * 32, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
static const long TILE_ITERATIONS = 1000000;

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

/* Six chains of sums, two tiles of 16 x 32 bfloat16 that are multiplied; none of the numbers is 0. */
__attribute__((target("amx-tile,amx-bf16"), noinline)) static void tile_chains(void)
{
    TileConfig config = {.palette = 1};
    _Alignas(64) uint16_t numbers[2 * 16 * 32];
    for (int i = 0; i < 2 * 16 * 32; i++) numbers[i] = (uint16_t)(0x3c00 + i % 512 + i % 2 * 0x8000);
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    __asm__ volatile("" : : "r"(&config), "r"(numbers) : "memory"); /* GCC 12 does not see that all of both is read */
    _tile_loadconfig(&config);
    _tile_loadd(6, numbers, 64);
    _tile_loadd(7, numbers + 16 * 32, 64);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    for (long i = 0; i < TILE_ITERATIONS; i++) {
        _tile_dpbf16ps(0, 6, 7);
        _tile_dpbf16ps(1, 6, 7);
        _tile_dpbf16ps(2, 6, 7);
        _tile_dpbf16ps(3, 6, 7);
        _tile_dpbf16ps(4, 6, 7);
        _tile_dpbf16ps(5, 6, 7);
    }
    _tile_release();
}

static int has_tiles(void)
{
    unsigned int a = 7, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    int known = (d >> 22 & 1) && (d >> 24 & 1); /* AMX-BF16, AMX-TILE */
    return known && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

static double peak_tiles(void)
{
    double best = 0;
    for (int repeat = 0; repeat < REPEATS; repeat++) {
        double started = omp_get_wtime(), threads = 0;
#pragma omp parallel reduction(+ : threads)
        {
            tile_chains();
            threads += 1;
        }
        double rate = threads * TILE_ITERATIONS * TILE_CHAINS * TILE_OPERATIONS / (omp_get_wtime() - started);
        if (rate > best) best = rate;
    }
    return best;
}

#else
static int has_tiles(void) { return 0; }
static double peak_tiles(void) { return 0; }
#endif

/* As many streams side by side as a call says: memory gives more to several than to one. */
enum { STRIPE = 256, AHEAD = 2048 };

__attribute__((target("avx2"))) static uint64_t xor_all(const char *from, size_t bytes, size_t streams)
{
    __m256i sum[8];
    size_t length = bytes / streams / STRIPE * STRIPE;
    for (int i = 0; i < 8; i++) sum[i] = _mm256_setzero_si256();
    for (size_t at = 0; at < length; at += STRIPE)
        for (size_t stream = 0; stream < streams; stream++) {
            const char *stripe = from + stream * length + at;
            for (int line = 0; line < STRIPE; line += 64) _mm_prefetch(stripe + AHEAD + line, _MM_HINT_T0);
            for (int i = 0; i < 8; i++)
                sum[i] = _mm256_xor_si256(sum[i], _mm256_load_si256((const __m256i *)stripe + i));
        }
    uint64_t total = 0;
    for (int i = 0; i < 8; i++) total ^= (uint64_t)_mm256_extract_epi64(sum[i], 0);
    return total;
}

/* Every thread reads a share of its own, over and over, as an engine reads its weights step after step. */
static double read_rate(size_t bytes)
{
    double best = 0;
    size_t step = 4096;
    bytes -= bytes % step;
    char *memory = aligned_alloc(step, bytes);
    if (memory == NULL) return 0;
#pragma omp parallel
    {
        size_t share = bytes / step / omp_get_num_threads() * step;
        memset(memory + omp_get_thread_num() * share, omp_get_thread_num() + 1, share);
    }
    for (int repeat = 0; repeat < 2 * REPEATS; repeat++) {
        size_t read = 0, streams = repeat % 2 ? 8 : 1;
        double started = omp_get_wtime();
#pragma omp parallel reduction(+ : read)
        {
            size_t share = bytes / step / omp_get_num_threads() * step;
            const char *mine = memory + omp_get_thread_num() * share;
            sink = (float)xor_all(mine, share, streams);
            read += share;
        }
        double rate = read / (omp_get_wtime() - started);
        if (rate > best) best = rate;
    }
    free(memory);
    return best;
}

int main(int argc, char **argv)
{
    if (argc < 2) return 2;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
        fprintf(stderr, "this processor has no AVX2 with FMA\n");
        return 1;
    }
    printf("{\"threads\": %d, \"fma_avx2\": %.6g, ", omp_get_max_threads(), peak_avx2());
    if (__builtin_cpu_supports("avx512f")) printf("\"fma_avx512\": %.6g, ", peak_avx512());
    if (has_tiles()) printf("\"tiles_bf16\": %.6g, ", peak_tiles());
    printf("\"read\": {");
    for (int i = 1; i < argc; i++)
        printf("%s\"%s\": %.6g", i > 1 ? ", " : "", argv[i], read_rate(strtoull(argv[i], NULL, 10)));
    printf("}}\n");
    return 0;
}
