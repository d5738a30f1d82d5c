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

/* Where the attention of a query to a part of the entries stands: `sum` of the weights, relative to the highest logit, and the
 * values weighted so, [D], in `mixed`.
 */
typedef struct {
    float highest, sum;
    float *mixed;
} partial;

#define SHARING 4 /* queries, at most, that read an entry together */
#define WIDEST 8  /* vectors of a head, at most */

/* Attention of `count` queries [D], D = 16 `wide`, to keys and values [S, D]; scores: [count, room], room for S + 16 each. Values
 * are asked for while keys are read: both come from afar, as all weights were read since.
 */
static inline __attribute__((always_inline)) void attend_with(const long wide, const long count, const float *queries,
                                                              const float *keys, const float *values, long s, float *scores,
                                                              long room, partial *const *to) {
    const long d = 16 * wide;
    for (long j = 0; j < s; j += 4) {
        __m512 dot[SHARING][4];
        for (long g = 0; g < count; g++)
            for (int i = 0; i < 4; i++) dot[g][i] = _mm512_setzero_ps();
        for (long c = 0; c < d; c += 16) {
            __m512 key[4];
            for (int i = 0; i < 4; i++) {
                const long at = (j + i < s ? j + i : j) * d + c;
                key[i] = _mm512_loadu_ps(keys + at);
                _mm_prefetch((const char *)(values + at), _MM_HINT_T0);
            }
            for (long g = 0; g < count; g++)
                for (int i = 0; i < 4; i++) dot[g][i] = _mm512_fmadd_ps(_mm512_loadu_ps(queries + g * d + c), key[i], dot[g][i]);
        }
        for (long g = 0; g < count; g++) _mm_storeu_ps(scores + g * room + j, four_sums(dot[g][0], dot[g][1], dot[g][2], dot[g][3]));
    }
    for (long g = 0; g < count; g++) {
        float *mine = scores + g * room;
        __m512 highest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (long j = s; j < s + 16; j++) mine[j] = -INFINITY;
        for (long j = 0; j < s; j += 16) highest = _mm512_max_ps(highest, _mm512_loadu_ps(mine + j));
        to[g]->highest = _mm512_reduce_max_ps(highest);
        highest = _mm512_set1_ps(to[g]->highest);
        for (long j = 0; j < s; j += 16) {
            __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(mine + j), highest));
            sum = _mm512_add_ps(sum, weight);
            _mm512_storeu_ps(mine + j, weight);
        }
        to[g]->sum = _mm512_reduce_add_ps(sum);
    }
    for (long first = 0; first < wide; first += 4) { /* as many as there are registers for */
        const long some = wide - first < 4 ? wide - first : 4;
        __m512 mixed[SHARING][4];
        for (long g = 0; g < count; g++)
            for (long c = 0; c < some; c++) mixed[g][c] = _mm512_setzero_ps();
        for (long j = 0; j < s; j++)
            for (long c = 0; c < some; c++) {
                __m512 value = _mm512_loadu_ps(values + j * d + 16 * (first + c));
                for (long g = 0; g < count; g++)
                    mixed[g][c] = _mm512_fmadd_ps(_mm512_set1_ps(scores[g * room + j]), value, mixed[g][c]);
            }
        for (long g = 0; g < count; g++)
            for (long c = 0; c < some; c++) _mm512_storeu_ps(to[g]->mixed + 16 * (first + c), mixed[g][c]);
    }
}

typedef void (*attention)(const float *, const float *, const float *, long, float *, long, partial *const *);

#define ATTEND(WIDE, COUNT)                                                                                                    \
    static void attend_##WIDE##_##COUNT(const float *queries, const float *keys, const float *values, long s, float *scores,   \
                                        long room, partial *const *to) {                                                       \
        attend_with(WIDE, COUNT, queries, keys, values, s, scores, room, to);                                                  \
    }
#define ATTENDS(WIDE) ATTEND(WIDE, 1) ATTEND(WIDE, 2) ATTEND(WIDE, 3) ATTEND(WIDE, 4)
ATTENDS(1)
ATTENDS(2)
ATTENDS(4)
ATTENDS(6)
ATTENDS(8)

/* Of so many queries of width D; NULL: of no width that is known here. */
static attention attention_of(long d, long count) {
#define KNOWN(WIDE) {attend_##WIDE##_1, attend_##WIDE##_2, attend_##WIDE##_3, attend_##WIDE##_4}
    static const attention known[WIDEST][SHARING] = {[0] = KNOWN(1), [1] = KNOWN(2), [3] = KNOWN(4), [5] = KNOWN(6), [7] = KNOWN(8)};
    return d % 16 || d < 16 || d > 16 * WIDEST ? NULL : known[d / 16 - 1][count - 1];
}

#define PART 128 /* entries, at most, that a query attends to in one go */

/* Parts of S entries: an even number of equal ones, so that two threads have the same to do. */
static long parts_of(long s) { return 2 * ((s + 2 * PART - 1) / (2 * PART)); }

/* 16 numbers of a head, from c on, of all entries together. */
static __m512 united(const partial *parts, long count, long c) {
    float highest = -INFINITY, sum = 0;
    for (long i = 0; i < count; i++) highest = parts[i].highest > highest ? parts[i].highest : highest;
    __m512 mixed = _mm512_setzero_ps();
    for (long i = 0; i < count; i++) {
        if (parts[i].sum == 0) continue; /* no entries */
        __m512 weight = exponential(_mm512_set1_ps(parts[i].highest - highest));
        sum += _mm512_cvtss_f32(weight) * parts[i].sum;
        mixed = _mm512_fmadd_ps(weight, _mm512_loadu_ps(parts[i].mixed + c), mixed);
    }
    return _mm512_div_ps(mixed, _mm512_set1_ps(sum));
}
#endif
