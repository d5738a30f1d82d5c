/* Products of a few rows with weights packed in 4 or 8 bits, the rows rounded to 8 bits by group: integers are multiplied and
 * summed within a group, groups are summed in float32. Each weight is read once.
 *
 * For processors with AVX-512 VNNI (products of bytes) and VBMI (permutations of bytes): INTEGER_PRODUCTS says whether this is one.
 * Each output row of each input row is summed in one fixed order, whatever the number of input rows and of threads.
 *
 * Functions whose name begins with team_ are called by every thread of a parallel region, share the work and wait for each other
 * at their end.
 *
 * Shapes: m input rows, N output rows, N' those with padding, K inputs, g group.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BW__)
#define INTEGER_PRODUCTS 1
#include <immintrin.h>

#define BLOCK 64       /* rows of one packed block of 4-bit codes */
#define HALF 32        /* bytes that hold one input's codes of a block */
#define TOGETHER 4     /* input rows that share one pass over the weights */
#define SMALL 65536    /* weights of a map that is not worth waking the other threads for */

/* A linear map without bias, as workers.mechanisms.packed_rows.PackedMap lays it out. */
typedef struct {
    int64_t bits;        /* 4 or 8 */
    int64_t k, n;        /* inputs, outputs */
    int64_t group;       /* inputs that share a scale; a multiple of 16 */
    int64_t height;      /* N' of 4 bits */
    const void *codes;   /* 4: uint8 [N'/64, K, 32], byte i of an input holds the codes of rows i (low half) and i + 32; 8: int8 [N, K] */
    const void *scales;  /* 4: bfloat16 [K/g, N', 2] (scale, zero); 8: bfloat16 [N] */
} map;

typedef struct {
    int8_t *codes;   /* [m, K] */
    float *scales;   /* [m, groups] */
    int32_t *sums;   /* [m, groups] of the codes */
    long groups;
} rounded;

static long groups_of(long k, long g) { return (k + g - 1) / g; }

/* Bytes of the codes, scales and sums of m rows, and more, so that reading a whole vector at the end is allowed. */
static size_t rounded_bytes(long m, long k, long groups) {
    return m * groups * (sizeof(float) + sizeof(int32_t)) + m * k + BLOCK;
}

static rounded rounded_in(void *room, long m, long groups) {
    float *scales = room;
    int32_t *sums = (int32_t *)(scales + m * groups);
    return (rounded){(int8_t *)(sums + m * groups), scales, sums, groups};
}

/* Round row r of x [m, K] to 8 bits by group of g inputs, the last one as long as is left; K and g are multiples of 16. */
static void round_row(const float *from, long r, long k, long g, const rounded *out) {
    for (long n = 0; n < out->groups; n++) {
        long start = n * g, stop = start + g < k ? start + g : k;
        __m512 most = _mm512_setzero_ps();
        int none = 0; /* some input is not a number: nor shall any output be */
        for (long i = start; i < stop; i += 16) {
            __m512 some = _mm512_abs_ps(_mm512_loadu_ps(from + i));
            none |= _mm512_cmp_ps_mask(some, some, _CMP_UNORD_Q);
            most = _mm512_max_ps(most, some);
        }
        float largest = none ? NAN : _mm512_reduce_max_ps(most);
        __m512 times = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
        __m512i sum = _mm512_setzero_si512();
        for (long i = start; i < stop; i += 16) {
            __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + i), times));
            sum = _mm512_add_epi32(sum, code);
            _mm_storeu_si128((__m128i *)(out->codes + r * k + i), _mm512_cvtsepi32_epi8(code));
        }
        out->scales[r * out->groups + n] = largest / 127.0f;
        out->sums[r * out->groups + n] = _mm512_reduce_add_epi32(sum);
    }
}

static void team_round(const float *x, long m, const map *w, const rounded *out) {
#pragma omp for schedule(static)
    for (long r = 0; r < m; r++) round_row(x + r * w->k, r, w->k, w->group, out);
}

/* One block of BLOCK output rows for ROWS input rows; out: [ROWS][4] vectors of 16 rows. */
#define INT4_BLOCK(NAME, ROWS)                                                                                                \
    static void NAME(const rounded *x, long row, long k, const uint8_t *packed, const uint32_t *grid, long group, long height, \
                     __m512 out[][4]) {                                                                                       \
        uint8_t order[64];                                                                                                    \
        for (int i = 0; i < 64; i++) order[i] = (i % 16 / 8) * 16 + i / 16 * 4 + i % 8 / 2 + i % 2 * HALF;                    \
        const __m512i pairs = _mm512_loadu_si512(order), nibble = _mm512_set1_epi8(15);                                       \
        const __m512i upper = _mm512_set1_epi32((int)0xffff0000);                                                             \
        __m512 total[ROWS][4];                                                                                                \
        for (int r = 0; r < ROWS; r++)                                                                                        \
            for (int j = 0; j < 4; j++) total[r][j] = _mm512_setzero_ps();                                                    \
        for (long g = 0; g < x->groups; g++) {                                                                                \
            __m512i sum[ROWS][4];                                                                                             \
            for (int r = 0; r < ROWS; r++)                                                                                    \
                for (int j = 0; j < 4; j++) sum[r][j] = _mm512_setzero_si512();                                               \
            for (long i = g * group; i < (g + 1) * group; i += 4) {                                                           \
                __m512i a = _mm512_permutexvar_epi8(pairs, _mm512_loadu_si512(packed + i * HALF));                            \
                __m512i b = _mm512_permutexvar_epi8(pairs, _mm512_loadu_si512(packed + (i + 2) * HALF));                      \
                __m512i first = _mm512_unpacklo_epi16(a, b), second = _mm512_unpackhi_epi16(a, b); /* 4 inputs side by side */ \
                __m512i code[4] = {_mm512_and_si512(first, nibble), _mm512_and_si512(second, nibble),                         \
                                   _mm512_and_si512(_mm512_srli_epi16(first, 4), nibble),                                     \
                                   _mm512_and_si512(_mm512_srli_epi16(second, 4), nibble)};                                   \
                for (int r = 0; r < ROWS; r++) {                                                                              \
                    int32_t four;                                                                                             \
                    memcpy(&four, x->codes + (row + r) * k + i, 4);                                                           \
                    for (int j = 0; j < 4; j++) sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], code[j], _mm512_set1_epi32(four)); \
                }                                                                                                             \
            }                                                                                                                 \
            for (int j = 0; j < 4; j++) {                                                                                     \
                __m512i pair = _mm512_loadu_si512(grid + g * height + 16 * j);                                                \
                __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));                                              \
                __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(pair, upper));                                             \
                for (int r = 0; r < ROWS; r++) {                                                                              \
                    long at = (row + r) * x->groups + g;                                                                      \
                    __m512 dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[r][j], _mm512_set1_epi32(8 * x->sums[at])));         \
                    __m512 part = _mm512_fmadd_ps(scale, dot, _mm512_mul_ps(zero, _mm512_set1_ps((float)x->sums[at])));       \
                    total[r][j] = _mm512_fmadd_ps(part, _mm512_set1_ps(x->scales[at]), total[r][j]);                          \
                }                                                                                                             \
            }                                                                                                                 \
        }                                                                                                                     \
        for (int r = 0; r < ROWS; r++)                                                                                        \
            for (int j = 0; j < 4; j++) out[r][j] = total[r][j];                                                              \
    }

INT4_BLOCK(int4_block_1, 1)
INT4_BLOCK(int4_block_2, 2)
INT4_BLOCK(int4_block_3, 3)
INT4_BLOCK(int4_block_4, 4)

typedef void (*int4_block)(const rounded *, long, long, const uint8_t *, const uint32_t *, long, long, __m512[][4]);

/* TOGETHER output rows for up to TOGETHER input rows; sums of bytes are of unsigned times signed ones, so 128 is added to the
 * inputs and taken off again. */
#define INT8_ROWS(NAME, ROWS)                                                                                                 \
    static void NAME(const rounded *x, long row, long k, const int8_t *codes, long group, int outputs, float out[][TOGETHER]) {           \
        const __m512i middle = _mm512_set1_epi8((char)0x80), ones = _mm512_set1_epi8(1), none = _mm512_setzero_si512();       \
        __m512 total[ROWS][TOGETHER];                                                                                         \
        for (int r = 0; r < ROWS; r++)                                                                                        \
            for (int o = 0; o < TOGETHER; o++) total[r][o] = _mm512_setzero_ps();                                             \
        for (long g = 0; g < x->groups; g++) {                                                                                \
            long start = g * group, left = k - start;                                                                    \
            __mmask64 some = left < group ? ((__mmask64)1 << left) - 1 : ~(__mmask64)0;                                  \
            __m512i in[ROWS];                                                                                                 \
            for (int r = 0; r < ROWS; r++)                                                                                    \
                in[r] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(some, x->codes + (row + r) * k + start), middle);            \
            for (int o = 0; o < TOGETHER; o++) {                                                                              \
                __m512i w = _mm512_maskz_loadu_epi8(some, codes + (o < outputs ? o : 0) * k + start);                         \
                __m512i added = _mm512_slli_epi32(_mm512_dpbusd_epi32(none, ones, w), 7);                                     \
                for (int r = 0; r < ROWS; r++) {                                                                              \
                    __m512i dot = _mm512_sub_epi32(_mm512_dpbusd_epi32(none, in[r], w), added);                               \
                    __m512 scale = _mm512_set1_ps(x->scales[(row + r) * x->groups + g]);                                      \
                    total[r][o] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, total[r][o]);                               \
                }                                                                                                             \
            }                                                                                                                 \
        }                                                                                                                     \
        for (int r = 0; r < ROWS; r++)                                                                                        \
            for (int o = 0; o < TOGETHER; o++) out[r][o] = _mm512_reduce_add_ps(total[r][o]);                                 \
    }

INT8_ROWS(int8_rows_1, 1)
INT8_ROWS(int8_rows_2, 2)
INT8_ROWS(int8_rows_3, 3)
INT8_ROWS(int8_rows_4, 4)

typedef void (*int8_some)(const rounded *, long, long, const int8_t *, long, int, float[][TOGETHER]);

static float widened(uint16_t bfloat) {
    uint32_t bits = (uint32_t)bfloat << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void team_multiply_4(const map *w, const rounded *x, long m, float *y) {
    const int4_block run[TOGETHER] = {int4_block_1, int4_block_2, int4_block_3, int4_block_4};
    const uint8_t *packed = w->codes;
    const uint32_t *grid = w->scales; /* a pair each */
#pragma omp for schedule(static)
    for (long block = 0; block < w->height / BLOCK; block++)
        for (long r = 0; r < m; r += TOGETHER) {
            int rows = m - r < TOGETHER ? (int)(m - r) : TOGETHER;
            __m512 out[TOGETHER][4];
            run[rows - 1](x, r, w->k, packed + block * w->k * HALF, grid + block * BLOCK, w->group, w->height, out);
            long left = w->n - block * BLOCK;
            for (int i = 0; i < rows && left > 0; i++)
                memcpy(y + (r + i) * w->n + block * BLOCK, out[i], sizeof(float) * (left < BLOCK ? left : BLOCK));
        }
}

static void team_multiply_8(const map *w, const rounded *x, long m, float *y) {
    const int8_some run[TOGETHER] = {int8_rows_1, int8_rows_2, int8_rows_3, int8_rows_4};
    const int8_t *codes = w->codes;
    const uint16_t *scales = w->scales;
#pragma omp for schedule(static)
    for (long first = 0; first < w->n; first += TOGETHER) {
        int outputs = w->n - first < TOGETHER ? (int)(w->n - first) : TOGETHER;
        for (long r = 0; r < m; r += TOGETHER) {
            int rows = m - r < TOGETHER ? (int)(m - r) : TOGETHER;
            float out[TOGETHER][TOGETHER];
            run[rows - 1](x, r, w->k, codes + first * w->k, w->group, outputs, out);
            for (int i = 0; i < rows; i++)
                for (int o = 0; o < outputs; o++) y[(r + i) * w->n + first + o] = widened(scales[first + o]) * out[i][o];
        }
    }
}

/* x -> y [m, N] */
static void team_multiply(const map *w, const rounded *x, long m, float *y) {
    (w->bits == 4 ? team_multiply_4 : team_multiply_8)(w, x, m, y);
}
#endif
