/* What stands around the attention of a decoder layer of the Llama kind, for a few rows: norms, products with packed weights
 * (packed_rows.h), rotary turns, SiLU, residuals, in one parallel region.
 *
 * Shapes: m rows, C hidden width, Hq query heads, H key-value heads, D head width, F width of the feed-forward block.
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

/* RMSNorm of one row, then its rounding. */
static void norm_row(const float *x, const float *weight, double eps, long r, const map *w, float *normed, const rounded *out) {
    long k = w->k;
    __m512 squares = _mm512_setzero_ps();
    for (long i = 0; i < k; i += 16) {
        __m512 some = _mm512_loadu_ps(x + i);
        squares = _mm512_fmadd_ps(some, some, squares);
    }
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)k + (float)eps));
    for (long i = 0; i < k; i += 16)
        _mm512_storeu_ps(normed + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale), _mm512_loadu_ps(weight + i)));
    round_row(normed, r, k, w->group, out);
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

/* Rows to work in: floats [m, the widest], and the rounded rows of every map in turn. */
typedef struct {
    float *rows;
    void *codes;
} room;

static room room_for(long m, const layer *const some[2]) {
    long floats = 0;
    size_t bytes = 0;
    for (int i = 0; i < 2; i++) {
        if (!some[i]) continue;
        const map *maps[] = {&some[i]->qkv, &some[i]->out, &some[i]->gate_up, &some[i]->down};
        for (int j = 0; j < 4; j++) {
            if (!maps[j]->codes) continue;
            floats = most(floats, most(maps[j]->k, maps[j] == &some[i]->gate_up ? maps[j]->n : 0));
            bytes = most(bytes, rounded_bytes(m, maps[j]->k, groups_of(maps[j]->k, maps[j]->group)));
        }
    }
    float *rows = malloc(m * floats * sizeof(float) + bytes + BLOCK);
    return (room){rows, rows ? rows + m * floats : NULL};
}

/* Norm and first product of a layer: hidden [m, C] -> heads [m, N], queries and keys turned. */
static void team_before(const layer *l, const float *hidden, const float *cosines, const float *sines, long m, float *heads, room at) {
    rounded given = rounded_in(at.codes, m, groups_of(l->qkv.k, l->qkv.group));
#pragma omp for schedule(static)
    for (long r = 0; r < m; r++)
        norm_row(hidden + r * l->qkv.k, l->norm_in, l->eps_in, r, &l->qkv, at.rows + r * l->qkv.k, &given);
    team_multiply(&l->qkv, &given, m, heads);
    if (!l->turned) return;
#pragma omp for schedule(static)
    for (long i = 0; i < m * l->turned; i++) {
        long r = i / l->turned, head = i % l->turned;
        turn(heads + r * l->qkv.n + head * l->width, cosines + r * l->width, sines + r * l->width, l->width);
    }
}

/* What follows the attention: mixed [m, Hq D], hidden [m, C] -> out [m, C]. */
static void team_after(const layer *l, const float *mixed, const float *hidden, long m, float *out, room at) {
    const long c = l->out.n, f = l->down.k;
    rounded given = rounded_in(at.codes, m, groups_of(l->out.k, l->out.group));
    team_round(mixed, m, &l->out, &given);
    team_multiply(&l->out, &given, m, out);
    given = rounded_in(at.codes, m, groups_of(c, l->gate_up.group));
#pragma omp for schedule(static)
    for (long r = 0; r < m; r++) {
        for (long i = r * c; i < (r + 1) * c; i += 16)
            _mm512_storeu_ps(out + i, _mm512_add_ps(_mm512_loadu_ps(hidden + i), _mm512_loadu_ps(out + i)));
        norm_row(out + r * c, l->norm_mlp, l->eps_mlp, r, &l->gate_up, at.rows + r * c, &given);
    }
    team_multiply(&l->gate_up, &given, m, at.rows);
    given = rounded_in(at.codes, m, groups_of(f, l->down.group));
#pragma omp for schedule(static)
    for (long r = 0; r < m; r++) {
        float *gate = at.rows + r * 2 * f; /* [2 F]; the product takes the gate's place */
        for (long i = 0; i < f; i += 16) {
            __m512 x = _mm512_loadu_ps(gate + i);
            __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
            _mm512_storeu_ps(gate + i, _mm512_mul_ps(_mm512_div_ps(x, below), _mm512_loadu_ps(gate + f + i)));
        }
        round_row(gate, r, f, l->down.group, &given);
    }
    team_multiply(&l->down, &given, m, at.rows);
#pragma omp for schedule(static)
    for (long i = 0; i < m * c; i += 16)
        _mm512_storeu_ps(out + i, _mm512_add_ps(_mm512_loadu_ps(out + i), _mm512_loadu_ps(at.rows + i)));
}

/* From the attention of one layer to that of the next: of either, NULL = there is none.
 *
 * mixed: [m, Hq D] of the attention of `last`; hidden: [m, C] that went into it; out: [m, C] that comes out of it.
 * cosines, sines: [m, D]; heads: [m, (Hq + 2 H) D] of `next`. Not 0: no memory.
 */
int between(const layer *last, const layer *next, const float *mixed, const float *hidden, const float *cosines, const float *sines,
            long m, float *out, float *heads, int threads) {
    const layer *some[2] = {last, next};
    room at = room_for(m, some);
    if (!at.rows) return 1;
#pragma omp parallel num_threads(threads)
    {
        if (last) team_after(last, mixed, hidden, m, out, at);
        if (next) team_before(next, last ? out : hidden, cosines, sines, m, heads, at);
    }
    free(at.rows);
    return 0;
}
#endif
