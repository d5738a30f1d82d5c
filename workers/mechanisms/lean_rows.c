/* Decoder layers of the Llama kind for a few rows: norms, products with packed weights (packed_rows.h), rotary turns, SiLU,
 * residuals from one attention to the next in one parallel region; and whole layers in one where every row is a single new token
 * and the cache is plain.
 *
 * Shapes: m rows, C hidden width, Hq query heads, H key-value heads, D head width, F width of the feed-forward block, S entries.
 */
#include "packed_rows.h"

#ifdef INTEGER_PRODUCTS
/* As workers.mechanisms.lean_rows.Shape lays it out. */
typedef struct {
    map qkv;          /* C -> (Hq + 2 H) D; after the last layer the head, C -> V */
    map out;          /* Hq D -> C */
    map gate_up;      /* C -> 2 F */
    map down;         /* F -> C */
    const float *norm_in, *norm_mlp; /* [C] */
    double eps_in, eps_mlp;
    int64_t width;    /* D */
    int64_t turned;   /* Hq + H: heads that rotary embedding turns */
} layer;

static long most(long a, long b) { return a > b ? a : b; }

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

/* RMSNorm of one row, ready for the map. */
static void norm_row(const float *x, const float *weight, double eps, long r, const map *w, float *normed, const inputs *to) {
    long k = w->k;
    __m512 squares = _mm512_setzero_ps();
    for (long i = 0; i < k; i += 16) {
        __m512 some = _mm512_loadu_ps(x + i);
        squares = _mm512_fmadd_ps(some, some, squares);
    }
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)k + (float)eps));
    for (long i = 0; i < k; i += 16)
        _mm512_storeu_ps(normed + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale), _mm512_loadu_ps(weight + i)));
    for (long n = 0; n < to->groups; n++) prepare_group(w, to, r, n);
}

/* The head at x [D] by cosines and signed sines [D]: x cos + roll(x, D / 2) sin. D is even. */
static void turn(float *x, const float *cosines, const float *sines, long d) {
    long half = d / 2;
    for (long i = 0; i < half; i += 16) {
        __mmask16 some = half - i < 16 ? (__mmask16)((1 << (half - i)) - 1) : (__mmask16)0xffff;
        __m512 low = _mm512_maskz_loadu_ps(some, x + i), high = _mm512_maskz_loadu_ps(some, x + half + i);
        __m512 a = _mm512_mul_ps(low, _mm512_maskz_loadu_ps(some, cosines + i));
        __m512 b = _mm512_mul_ps(high, _mm512_maskz_loadu_ps(some, cosines + half + i));
        _mm512_mask_storeu_ps(x + i, some, _mm512_fmadd_ps(high, _mm512_maskz_loadu_ps(some, sines + i), a));
        _mm512_mask_storeu_ps(x + half + i, some, _mm512_fmadd_ps(low, _mm512_maskz_loadu_ps(some, sines + half + i), b));
    }
}

/* To work in: what goes into a map and what comes out of it, floats [m, the widest] each, and what inputs_in needs. */
typedef struct {
    float *in, *out;
    void *beside;
} room;

static room room_for(long m, const layer *const *some, long count) {
    long widest_in = 0, widest_out = 0;
    size_t bytes = 0;
    for (long i = 0; i < count; i++) {
        if (!some[i]) continue;
        const map *maps[] = {&some[i]->qkv, &some[i]->out, &some[i]->gate_up, &some[i]->down};
        for (int j = 0; j < 4; j++) {
            if (!maps[j]->codes) continue;
            widest_in = most(widest_in, maps[j]->k);
            widest_out = most(widest_out, j < 2 ? 0 : maps[j]->n); /* the others have rooms of their own */
            bytes = most(bytes, inputs_bytes(maps[j], m));
        }
    }
    float *in = malloc(m * (widest_in + widest_out) * sizeof(float) + bytes);
    return (room){in, in ? in + m * widest_in : NULL, in ? in + m * (widest_in + widest_out) : NULL};
}

/* Norm and first product of a layer: hidden [m, C] -> heads [m, N], queries and keys turned. */
static void team_before(const layer *l, const float *hidden, const float *cosines, const float *sines, long m, float *heads, room at,
                        meeting *all) {
    const inputs given = inputs_in(at.beside, at.in, m, &l->qkv);
#pragma omp for schedule(static) nowait
    for (long r = 0; r < m; r++)
        norm_row(hidden + r * l->qkv.k, l->norm_in, l->eps_in, r, &l->qkv, at.in + r * l->qkv.k, &given);
    team_wait(all);
    team_multiply(&l->qkv, &given, m, heads, all);
    if (!l->turned) return;
#pragma omp for schedule(static) nowait
    for (long i = 0; i < m * l->turned; i++) {
        long r = i / l->turned, head = i % l->turned;
        turn(heads + r * l->qkv.n + head * l->width, cosines + r * l->width, sines + r * l->width, l->width);
    }
    team_wait(all);
}

/* What follows the attention: mixed [m, Hq D], hidden [m, C] -> out [m, C]. */
static void team_after(const layer *l, const float *mixed, const float *hidden, long m, float *out, room at, meeting *all) {
    const long c = l->out.n, f = l->down.k;
    inputs given = inputs_in(at.beside, mixed, m, &l->out);
    team_prepare(&l->out, &given, m, all);
    team_multiply(&l->out, &given, m, out, all);
    given = inputs_in(at.beside, at.in, m, &l->gate_up);
#pragma omp for schedule(static) nowait
    for (long r = 0; r < m; r++) {
        for (long i = r * c; i < (r + 1) * c; i += 16)
            _mm512_storeu_ps(out + i, _mm512_add_ps(_mm512_loadu_ps(hidden + i), _mm512_loadu_ps(out + i)));
        norm_row(out + r * c, l->norm_mlp, l->eps_mlp, r, &l->gate_up, at.in + r * c, &given);
    }
    team_wait(all);
    team_multiply(&l->gate_up, &given, m, at.out, all);
    given = inputs_in(at.beside, at.in, m, &l->down);
#pragma omp for schedule(static) nowait
    for (long j = 0; j < m * given.groups; j++) {
        const long r = j / given.groups, n = j % given.groups;
        const float *gate = at.out + r * 2 * f, *up = gate + f;
        for (long i = n * l->down.group; i < f && i < (n + 1) * l->down.group; i += 16) {
            __m512 x = _mm512_loadu_ps(gate + i);
            __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
            _mm512_storeu_ps(at.in + r * f + i, _mm512_mul_ps(_mm512_div_ps(x, below), _mm512_loadu_ps(up + i)));
        }
        prepare_group(&l->down, &given, r, n);
    }
    team_wait(all);
    team_multiply(&l->down, &given, m, at.out, all);
#pragma omp for schedule(static) nowait
    for (long i = 0; i < m * c; i += 16)
        _mm512_storeu_ps(out + i, _mm512_add_ps(_mm512_loadu_ps(out + i), _mm512_loadu_ps(at.out + i)));
    team_wait(all);
}

/* What one head of a layer remembers of all rows, as workers.mechanisms.lean_rows.Memory lays it out. */
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

/* Keys and values of heads [m, Hq + 2 H, D] become the newest entries; then every query attends: mixed [m, Hq D].
 *
 * some: [H] of this layer; scores: [threads, stride].
 */
static void team_attend(const layer *l, const memory *some, const float *heads, long m, float scale, float *scores, long stride,
                        float *mixed, meeting *all) {
    const long d = l->width, kept = l->qkv.n / d - l->turned, queries = l->turned - kept;
    const attention attend = attention_of(d);
#pragma omp for schedule(static) nowait
    for (long i = 0; i < m * kept; i++) {
        const memory *at = some + i % kept;
        const float *key = heads + i / kept * l->qkv.n + (queries + i % kept) * d;
        long place = i / kept * at->row + at->length * d;
        memcpy(at->keys + place, key, d * sizeof(float));
        memcpy(at->values + place, key + kept * d, d * sizeof(float));
    }
    team_wait(all);
#pragma omp for schedule(static) nowait
    for (long i = 0; i < m * queries; i++) {
        long r = i / queries, head = i % queries;
        const memory *at = some + head / (queries / kept);
        attend(heads + r * l->qkv.n + head * d, at->keys + r * at->row, at->values + r * at->row, at->length + 1, scale,
               scores + omp_get_thread_num() * stride, mixed + (r * queries + head) * d);
    }
    team_wait(all);
}

int knows_width(long d) { return attention_of(d) != NULL; }

/* All of some layers of one shape, of a known width, for m rows of one new token each: hidden [m, C] -> out [m, C]. The new entries are written behind
 * those of the memories [count, H]; scales: of the logits, [count]; heads: as in `between`, to work in. Not 0: no memory. */
int through(const layer *const *layers, long count, const memory *memories, const double *scales, const float *hidden,
            const float *cosines, const float *sines, long m, float *out, float *heads, int threads) {
    const long d = layers[0]->width, kept = layers[0]->qkv.n / d - layers[0]->turned, c = layers[0]->qkv.k;
    long longest = 0;
    for (long i = 0; i < count * kept; i++) longest = most(longest, memories[i].length);
    const long stride = longest + 1 + 2 * BLOCK, mixed_width = (layers[0]->turned - kept) * d;
    room at = {0};
    float *between_layers = malloc((m * (mixed_width + c) + threads * stride) * sizeof(float));
    if (between_layers) at = room_for(m, layers, count);
    if (!at.in) {
        free(between_layers);
        return 1;
    }
    float *mixed = between_layers, *other = mixed + m * mixed_width, *scores = other + m * c;
    meeting all = {0};
#pragma omp parallel num_threads(threads)
    {
        const float *in = hidden;
        for (long i = 0; i < count; i++) {
            float *to = (count - i) % 2 ? out : other; /* the last one is `out` */
            team_before(layers[i], in, cosines, sines, m, heads, at, &all);
            team_attend(layers[i], memories + i * kept, heads, m, (float)scales[i], scores, stride, mixed, &all);
            team_after(layers[i], mixed, in, m, to, at, &all);
            in = to;
        }
    }
    free(at.in);
    free(between_layers);
    return 0;
}

/* From the attention of one layer to that of the next: of either, NULL = there is none.
 *
 * mixed: [m, Hq D] of the attention of `last`; hidden: [m, C] that went into it; out: [m, C] that comes out of it.
 * cosines, sines: [m, D]; heads: [m, (Hq + 2 H) D] of `next`. Not 0: no memory.
 */
int between(const layer *last, const layer *next, const float *mixed, const float *hidden, const float *cosines, const float *sines,
            long m, float *out, float *heads, int threads) {
    const layer *some[2] = {last, next};
    room at = room_for(m, some, 2);
    if (!at.in) return 1;
    meeting all = {0};
#pragma omp parallel num_threads(threads)
    {
        if (last) team_after(last, mixed, hidden, m, out, at, &all);
        if (next) team_before(next, last ? out : hidden, cosines, sines, m, heads, at, &all);
    }
    free(at.in);
    return 0;
}
#endif
