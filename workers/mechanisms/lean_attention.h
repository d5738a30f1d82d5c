/* Attention of one query to the keys and values of one head, in float32.
 *
 * Shapes: S entries, D head width.
 */
#pragma once
#include "packed_rows.h"

#ifdef INTEGER_PRODUCTS
/* e to the x, to about two units in the last place: x = n ln 2 + r, a polynomial of r. */
static __m512 exponential(__m512 x) {
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    const float parts[] = {1.9875691e-4f, 1.3981999e-3f, 8.3334519e-3f, 4.1665796e-2f, 1.6666665e-1f, 5.0000001e-1f, 1.0f, 1.0f};
    __m512 sum = _mm512_set1_ps(parts[0]);
    for (int i = 1; i < 8; i++) sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(parts[i]));
    return _mm512_scalef_ps(sum, n);
}

/* What one head of a layer remembers of all rows, as workers.mechanisms.lean_memory.Memory lays it out. */
typedef struct {
    float *keys, *values; /* [S, D] of the first row */
    int64_t row;          /* numbers from one row to the next */
    int64_t length;       /* S, without the new entry */
} memory;

/* Attention of a query [D] to keys and values [S, D] -> out [D], D = 16 PARTS; scores: room for S + 16. */
#define ATTEND(NAME, PARTS)                                                                                                   \
    static void NAME(const float *query, const float *keys, const float *values, long s, float scale, float *scores, float *out) { \
        const long d = 16 * PARTS;                                                                                            \
        __m512 q[PARTS], even[PARTS], odd[PARTS], highest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();             \
        for (int c = 0; c < PARTS; c++) {                                                                                     \
            q[c] = _mm512_mul_ps(_mm512_loadu_ps(query + 16 * c), _mm512_set1_ps(scale));                                     \
            even[c] = odd[c] = _mm512_setzero_ps();                                                                           \
        }                                                                                                                     \
        for (long j = 0; j < s; j += 4) {                                                                                     \
            __m512 dot[4];                                                                                                    \
            for (int i = 0; i < 4; i++) {                                                                                     \
                const float *key = keys + (j + i < s ? j + i : j) * d;                                                        \
                dot[i] = _mm512_mul_ps(q[0], _mm512_loadu_ps(key));                                                           \
                for (int c = 1; c < PARTS; c++) dot[i] = _mm512_fmadd_ps(q[c], _mm512_loadu_ps(key + 16 * c), dot[i]);        \
            }                                                                                                                 \
            _mm_storeu_ps(scores + j, four_sums(dot[0], dot[1], dot[2], dot[3]));                                             \
        }                                                                                                                     \
        for (long j = s; j < s + 16; j++) scores[j] = -INFINITY;                                                              \
        for (long j = 0; j < s; j += 16) highest = _mm512_max_ps(highest, _mm512_loadu_ps(scores + j));                       \
        highest = _mm512_set1_ps(_mm512_reduce_max_ps(highest));                                                              \
        for (long j = 0; j < s; j += 16) {                                                                                    \
            __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + j), highest));                                 \
            sum = _mm512_add_ps(sum, weight);                                                                                 \
            _mm512_storeu_ps(scores + j, weight);                                                                             \
        }                                                                                                                     \
        for (long j = 0; j < s; j += 2) {                                                                                     \
            const float *value = values + j * d, *next = j + 1 < s ? value + d : value; /* its weight is 0 behind the end */  \
            __m512 one = _mm512_set1_ps(scores[j]), two = _mm512_set1_ps(scores[j + 1]);                                      \
            for (int c = 0; c < PARTS; c++) {                                                                                 \
                even[c] = _mm512_fmadd_ps(one, _mm512_loadu_ps(value + 16 * c), even[c]);                                     \
                odd[c] = _mm512_fmadd_ps(two, _mm512_loadu_ps(next + 16 * c), odd[c]);                                        \
            }                                                                                                                 \
        }                                                                                                                     \
        __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));                                                      \
        for (int c = 0; c < PARTS; c++) _mm512_storeu_ps(out + 16 * c, _mm512_mul_ps(_mm512_add_ps(even[c], odd[c]), share)); \
    }

ATTEND(attend_16, 1)
ATTEND(attend_32, 2)
ATTEND(attend_64, 4)
ATTEND(attend_96, 6)
ATTEND(attend_128, 8)

typedef void (*attention)(const float *, const float *, const float *, long, float, float *, float *);

/* NULL: of no width that is known here. */
static attention attention_of(long d) {
    return d == 16 ? attend_16 : d == 32 ? attend_32 : d == 64 ? attend_64 : d == 96 ? attend_96 : d == 128 ? attend_128 : NULL;
}
#endif
