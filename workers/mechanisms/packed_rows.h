/* Products of a few rows with weights packed in 4 or 8 bits; each weight is read once. The rows are rounded to 8 or 16 bits by
 * group: integers are multiplied and summed within a group, and groups are summed in float32.
 *
 * For processors with AVX-512 VNNI (products of bytes): INTEGER_PRODUCTS says whether this is one.
 * Each output row of each input row is summed in one fixed order, whatever the number of input rows and of threads.
 *
 * Functions whose name begins with team_ are called by every thread of a parallel region, share the work and wait for each other
 * at their end: all with the same `meeting`, which begins as zeros.
 *
 * Shapes: m input rows, N output rows, N' those with padding, K inputs, g group, P planes: bytes of an input.
 */
#pragma once
#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define INTEGER_PRODUCTS 1
#include <immintrin.h>

#define BLOCK 64       /* rows of one packed block of 4-bit codes */
#define HALF 32        /* bytes that hold one input's codes of a block */
#define TOGETHER 4     /* input rows that share one pass over the weights, where a byte holds each input; else half as many */
#define AHEAD 8192     /* bytes of 4-bit codes asked for before they are needed, into the second cache: in the first few can wait */
#define ROWS_AHEAD 8   /* rows of 8-bit codes asked for before they are needed, into the first cache, which is faster for them */
#define SMALL 65536    /* weights of a map that is not worth waking the other threads for */
#define PATIENCE 20000 /* looks at the others before another program may go first */

/* Where the threads of a team wait for each other. There are a dozen such places in a layer, and a barrier of OpenMP takes half a
 * microsecond.
 */
typedef struct {
    _Alignas(64) int arrived;
    _Alignas(64) int round;
} meeting;

static void team_wait(meeting *at) {
    const int round = __atomic_load_n(&at->round, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&at->arrived, 1, __ATOMIC_ACQ_REL) == omp_get_num_threads()) {
        __atomic_store_n(&at->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&at->round, round + 1, __ATOMIC_RELEASE);
    } else {
        for (long tries = 0; __atomic_load_n(&at->round, __ATOMIC_ACQUIRE) == round; tries++)
            if (tries > PATIENCE) sched_yield(); /* there may be fewer processors than threads */
    }
}

/* A linear map without bias, as workers.mechanisms.packed_rows.PackedMap lays it out. */
typedef struct {
    int64_t bits;        /* 4 or 8 */
    int64_t k, n;        /* inputs, outputs */
    int64_t group;       /* inputs that share a scale; a multiple of 16, beside weights of 8 bits of 64 */
    int64_t height;      /* N' of 4 bits */
    int64_t planes;      /* bytes that an input is rounded to, by group: 1 or 2 */
    const void *codes;   /* 4: uint8 [N'/64, K/4, 32, 4], byte i of an input holds rows i (low half) and i + 32; 8: int8 [N, K] */
    const void *scales;  /* 4: bfloat16 [K/g, N', 2] (scale, zero); 8: bfloat16 [N] */
} map;

/* What goes into a map. */
typedef struct {
    const float *rows; /* [m, K] */
    long groups;
    long gap;          /* m K, from one plane to the next */
    float *scales;     /* [m, groups] */
    float *totals;     /* [m, groups] of the rounded inputs */
    int32_t *sums;     /* [m, groups] of their codes */
    int8_t *codes;     /* [P, m, K]; an input of two planes is 256 times its first byte plus its second */
} inputs;

static long groups_of(const map *w) { return (w->k + w->group - 1) / w->group; }

/* Bytes beside the rows, and more, so that reading a whole vector at the end is allowed. */
static size_t inputs_bytes(const map *w, long m) {
    return m * groups_of(w) * (2 * sizeof(float) + sizeof(int32_t)) + w->planes * m * w->k + BLOCK;
}

static inputs inputs_in(void *room, const float *rows, long m, const map *w) {
    long groups = groups_of(w);
    float *scales = room, *totals = scales + m * groups;
    int32_t *sums = (int32_t *)(totals + m * groups);
    return (inputs){rows, groups, m * w->k, scales, totals, sums, (int8_t *)(sums + m * groups)};
}

/* Round group n of row r; K and g are multiples of 16, the last group is as long as is left. */
static void prepare_group(const map *w, const inputs *to, long r, long n) {
    const float top = w->planes == 2 ? 127 * 256 + 127 : 127; /* the largest whose first byte is no more than 127 */
    const float *from = to->rows + r * w->k;
    int8_t *codes = to->codes + r * w->k;
    const long start = n * w->group, stop = start + w->group < w->k ? start + w->group : w->k;
    __m512 most = _mm512_setzero_ps();
    int none = 0; /* some input is not a number: nor shall any output be */
    for (long i = start; i < stop; i += 16) {
        __m512 some = _mm512_abs_ps(_mm512_loadu_ps(from + i));
        none |= _mm512_cmp_ps_mask(some, some, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, some);
    }
    float largest = none ? NAN : _mm512_reduce_max_ps(most);
    __m512 times = _mm512_set1_ps(largest > 0 ? top / largest : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (long i = start; i < stop; i += 16) {
        __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + i), times));
        sum = _mm512_add_epi32(sum, code);
        if (w->planes == 2) {
            __m512i high = _mm512_srai_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(128)), 8);
            _mm_storeu_si128((__m128i *)(codes + i), _mm512_cvtsepi32_epi8(high));
            code = _mm512_sub_epi32(code, _mm512_slli_epi32(high, 8));
        }
        _mm_storeu_si128((__m128i *)(codes + (w->planes - 1) * to->gap + i), _mm512_cvtsepi32_epi8(code));
    }
    const long at = r * to->groups + n;
    to->scales[at] = largest / top;
    to->sums[at] = _mm512_reduce_add_epi32(sum);
    to->totals[at] = (float)to->sums[at] * to->scales[at];
}

static void team_prepare(const map *w, const inputs *to, long m, meeting *at) {
#pragma omp for schedule(static) nowait
    for (long i = 0; i < m * to->groups; i++) prepare_group(w, to, i / to->groups, i % to->groups);
    team_wait(at);
}

/* Four products of unsigned with signed bytes more in each sum. As an instruction: GCC copies every sum around its own form. */
static inline __m512i add_products(__m512i sum, __m512i bytes, __m512i signed_bytes) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(signed_bytes));
    return sum;
}

/* A sum of products of inputs of one or two planes, from the sums of each plane. */
static inline __m512i joined(const __m512i *planes, int count) {
    return count == 2 ? _mm512_add_epi32(_mm512_slli_epi32(planes[0], 8), planes[1]) : planes[0];
}

/* One block of BLOCK output rows for ROWS input rows; out: [ROWS][4] vectors of 16 rows.
 *
 * A byte is 16 times the code of its upper row plus that of its lower row. Both are multiplied at once, then the lower one alone;
 * the upper one is a sixteenth of the difference. Sums begin with what makes codes signed: -8 times the sum of the inputs. All of
 * them stay below 2^31 with two planes and 256 inputs a group: (8 * 16 + 8) * 127.5 * 256 * 256.
 */
#define INT4_BLOCK(NAME, ROWS, PLANES)                                                                                         \
    static void NAME(const inputs *x, long row, long k, const uint8_t *packed, const uint32_t *grid, long group, long height,  \
                     __m512 out[][4]) {                                                                                        \
        const __m512i nibble = _mm512_set1_epi8(15), upper = _mm512_set1_epi32((int)0xffff0000);                               \
        __m512 total[ROWS][4];                                                                                                 \
        for (int r = 0; r < ROWS; r++)                                                                                         \
            for (int j = 0; j < 4; j++) total[r][j] = _mm512_setzero_ps();                                                     \
        for (long g = 0; g < x->groups; g++) {                                                                                 \
            __m512i both[ROWS][2][PLANES], lower[ROWS][2][PLANES];                                                             \
            for (int r = 0; r < ROWS; r++) {                                                                                   \
                int32_t inputs = x->sums[(row + r) * x->groups + g];                                                           \
                for (int j = 0; j < 2; j++)                                                                                    \
                    for (int p = 0; p < PLANES; p++) {                                                                         \
                        both[r][j][p] = _mm512_set1_epi32(p == PLANES - 1 ? -(16 + 1) * 8 * inputs : 0);                       \
                        lower[r][j][p] = _mm512_set1_epi32(p == PLANES - 1 ? -8 * inputs : 0);                                 \
                    }                                                                                                          \
            }                                                                                                                  \
            _Pragma("GCC unroll 2")                                                                                            \
            for (long i = g * group; i < (g + 1) * group; i += 4) {                                                            \
                const uint8_t *at = packed + i * HALF;                                                                         \
                _mm_prefetch(at + AHEAD, _MM_HINT_T1);                                                                         \
                _mm_prefetch(at + AHEAD + 64, _MM_HINT_T1);                                                                    \
                for (int j = 0; j < 2; j++) {                                                                                  \
                    __m512i code = _mm512_loadu_si512(at + 64 * j), low = _mm512_and_si512(code, nibble);                      \
                    for (int r = 0; r < ROWS; r++)                                                                             \
                        for (int p = 0; p < PLANES; p++) {                                                                     \
                            int32_t four;                                                                                      \
                            memcpy(&four, x->codes + p * x->gap + (row + r) * k + i, 4);                                       \
                            both[r][j][p] = add_products(both[r][j][p], code, _mm512_set1_epi32(four));                 \
                            lower[r][j][p] = add_products(lower[r][j][p], low, _mm512_set1_epi32(four));                \
                        }                                                                                                      \
                }                                                                                                              \
            }                                                                                                                  \
            for (int j = 0; j < 4; j++) {                                                                                      \
                _mm_prefetch(grid + (g + 4) * height + 16 * j, _MM_HINT_T1);                                                   \
                __m512i pair = _mm512_loadu_si512(grid + g * height + 16 * j);                                                 \
                __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));                                               \
                __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(pair, upper));                                              \
                for (int r = 0; r < ROWS; r++) {                                                                               \
                    long at = (row + r) * x->groups + g;                                                                       \
                    __m512i sum = joined(lower[r][j % 2], PLANES);                                                             \
                    if (j > 1) sum = _mm512_sub_epi32(joined(both[r][j % 2], PLANES), sum); /* 16 times */                     \
                    __m512 step = _mm512_set1_ps(j > 1 ? x->scales[at] / 16 : x->scales[at]);                                  \
                    total[r][j] = _mm512_fmadd_ps(scale, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), step), total[r][j]);           \
                    total[r][j] = _mm512_fmadd_ps(zero, _mm512_set1_ps(x->totals[at]), total[r][j]);                           \
                }                                                                                                              \
            }                                                                                                                  \
        }                                                                                                                      \
        for (int r = 0; r < ROWS; r++)                                                                                         \
            for (int j = 0; j < 4; j++) out[r][j] = total[r][j];                                                               \
    }

INT4_BLOCK(int4_block_1, 1, 1)
INT4_BLOCK(int4_block_2, 2, 1)
INT4_BLOCK(int4_block_3, 3, 1)
INT4_BLOCK(int4_block_4, 4, 1)
INT4_BLOCK(wide4_block_1, 1, 2)
INT4_BLOCK(wide4_block_2, 2, 2)

typedef void (*four_bits)(const inputs *, long, long, const uint8_t *, const uint32_t *, long, long, __m512[][4]);

/* TOGETHER output rows for ROWS input rows. Sums of bytes are of unsigned times signed ones: 128 is added to the weights, and the
 * sums begin with what takes it off again. A group is whole vectors, of the last one as much as is left.
 */
#define INT8_ROWS(NAME, ROWS, PLANES)                                                                                          \
    static void NAME(const inputs *x, long row, long k, const int8_t *codes, long group, int outputs, __m512 out[][TOGETHER]) {\
        const __m512i middle = _mm512_set1_epi8((char)0x80);                                                                   \
        const __mmask64 last = ~(__mmask64)0 >> (64 - k % 64) % 64;                                                            \
        __m512 total[ROWS][TOGETHER];                                                                                          \
        for (int r = 0; r < ROWS; r++)                                                                                         \
            for (int o = 0; o < TOGETHER; o++) total[r][o] = _mm512_setzero_ps();                                              \
        for (long g = 0; g < x->groups; g++) {                                                                                 \
            const long start = g * group, stop = start + group < k ? start + group : k;                                        \
            __m512i dot[ROWS][TOGETHER][PLANES];                                                                               \
            for (int r = 0; r < ROWS; r++)                                                                                     \
                for (int o = 0; o < TOGETHER; o++) {                                                                           \
                    for (int p = 0; p < PLANES; p++) dot[r][o][p] = _mm512_setzero_si512();                                    \
                    dot[r][o][PLANES - 1] = _mm512_maskz_set1_epi32(1, -128 * x->sums[(row + r) * x->groups + g]);             \
                }                                                                                                              \
            for (long i = start; i < stop; i += 64) {                                                                          \
                const __mmask64 some = i + 64 > k ? last : ~(__mmask64)0;                                                      \
                __m512i in[ROWS][PLANES];                                                                                      \
                for (int r = 0; r < ROWS; r++)                                                                                 \
                    for (int p = 0; p < PLANES; p++)                                                                           \
                        in[r][p] = _mm512_maskz_loadu_epi8(some, x->codes + p * x->gap + (row + r) * k + i);                   \
                for (int o = 0; o < TOGETHER; o++) {                                                                           \
                    const int8_t *at = codes + (o < outputs ? o : 0) * k + i;                                                  \
                    _mm_prefetch(at + ROWS_AHEAD * k, _MM_HINT_T0);                                                            \
                    __m512i w = i + 64 > k ? _mm512_maskz_loadu_epi8(last, at) : _mm512_loadu_si512(at);                       \
                    w = _mm512_xor_si512(w, middle);                                                                           \
                    for (int r = 0; r < ROWS; r++)                                                                             \
                        for (int p = 0; p < PLANES; p++) dot[r][o][p] = _mm512_dpbusd_epi32(dot[r][o][p], w, in[r][p]);        \
                }                                                                                                              \
            }                                                                                                                  \
            for (int r = 0; r < ROWS; r++) {                                                                                   \
                __m512 step = _mm512_set1_ps(x->scales[(row + r) * x->groups + g]);                                            \
                for (int o = 0; o < TOGETHER; o++)                                                                             \
                    total[r][o] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(joined(dot[r][o], PLANES)), step, total[r][o]);           \
            }                                                                                                                  \
        }                                                                                                                      \
        for (int r = 0; r < ROWS; r++)                                                                                         \
            for (int o = 0; o < TOGETHER; o++) out[r][o] = total[r][o];                                                        \
    }

INT8_ROWS(int8_rows_1, 1, 1)
INT8_ROWS(int8_rows_2, 2, 1)
INT8_ROWS(int8_rows_3, 3, 1)
INT8_ROWS(int8_rows_4, 4, 1)
INT8_ROWS(wide8_rows_1, 1, 2)
INT8_ROWS(wide8_rows_2, 2, 2)

typedef void (*eight_bits)(const inputs *, long, long, const int8_t *, long, int, __m512[][TOGETHER]);

/* Four sums of 16 numbers each, side by side. */
static __m128 four_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high)); /* in each quarter a part of all four */
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

static float widened(uint16_t bfloat) {
    uint32_t bits = (uint32_t)bfloat << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void team_multiply_4(const map *w, const inputs *x, long m, float *y, meeting *at) {
    const four_bits kernels[2][TOGETHER] = {{int4_block_1, int4_block_2, int4_block_3, int4_block_4},
                                            {wide4_block_1, wide4_block_2}};
    const four_bits *run = kernels[w->planes - 1];
    const long together = TOGETHER / w->planes;
    const uint8_t *packed = w->codes;
    const uint32_t *grid = w->scales; /* a pair each */
#pragma omp for schedule(static) nowait
    for (long block = 0; block < w->height / BLOCK; block++)
        for (long r = 0; r < m; r += together) {
            int rows = (int)(m - r < together ? m - r : together);
            __m512 out[TOGETHER][4];
            run[rows - 1](x, r, w->k, packed + block * w->k * HALF, grid + block * BLOCK, w->group, w->height, out);
            long left = w->n - block * BLOCK;
            for (int i = 0; i < rows && left > 0; i++)
                memcpy(y + (r + i) * w->n + block * BLOCK, out[i], sizeof(float) * (left < BLOCK ? left : BLOCK));
        }
    team_wait(at);
}

static void team_multiply_8(const map *w, const inputs *x, long m, float *y, meeting *at) {
    const eight_bits kernels[2][TOGETHER] = {{int8_rows_1, int8_rows_2, int8_rows_3, int8_rows_4},
                                             {wide8_rows_1, wide8_rows_2}};
    const eight_bits *run = kernels[w->planes - 1];
    const long together = TOGETHER / w->planes;
    const int8_t *codes = w->codes;
    const uint16_t *scales = w->scales;
#pragma omp for schedule(static) nowait
    for (long first = 0; first < w->n; first += TOGETHER) {
        int outputs = w->n - first < TOGETHER ? (int)(w->n - first) : TOGETHER;
        for (long r = 0; r < m; r += together) {
            int rows = (int)(m - r < together ? m - r : together);
            __m512 out[TOGETHER][TOGETHER];
            run[rows - 1](x, r, w->k, codes + first * w->k, w->group, outputs, out);
            for (int i = 0; i < rows; i++) {
                float sums[TOGETHER];
                _mm_storeu_ps(sums, four_sums(out[i][0], out[i][1], out[i][2], out[i][3]));
                for (int o = 0; o < outputs; o++) y[(r + i) * w->n + first + o] = widened(scales[first + o]) * sums[o];
            }
        }
    }
    team_wait(at);
}

/* x -> y [m, N] */
static void team_multiply(const map *w, const inputs *x, long m, float *y, meeting *at) {
    (w->bits == 4 ? team_multiply_4 : team_multiply_8)(w, x, m, y, at);
}
#endif
