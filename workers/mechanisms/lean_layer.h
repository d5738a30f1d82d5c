/* One decoder layer of the Llama kind for a few rows, but for its attention: norms, products with packed weights, rotary turns, SiLU
 * and residuals, and the room that they work in.
 *
 * Shapes: m rows, C hidden width, Hq query heads, H key-value heads, D head width, F width of the feed-forward block, V vocabulary.
 */
#pragma once
#include "lean_attention.h"
#include "packed_rows.h"

#ifdef INTEGER_PRODUCTS
/* As workers.mechanisms.lean_maps.Shape lays it out. */
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

static __m512 sum_at(const float *x, const float *more, long i) {
    __m512 some = _mm512_loadu_ps(x + i);
    return more ? _mm512_add_ps(some, _mm512_loadu_ps(more + i)) : some;
}

/* RMSNorm of x + more [m, C] (more NULL: of x), ready for the map; sum: x + more itself, neither of the two. A single row every
 * thread has for itself: that takes less than to fetch what another one did.
 */
static void team_norm(const float *x, const float *more, const float *weight, double eps, long m, const map *w, float *normed,
                      const inputs *to, float *sum, meeting *all) {
    const long k = w->k, threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const long first = m == 1 ? 0 : thread * m / threads, last = m == 1 ? 1 : (thread + 1) * m / threads;
    for (long r = first; r < last; r++) {
        __m512 squares = _mm512_setzero_ps();
        for (long i = r * k; i < (r + 1) * k; i += 16) {
            __m512 some = sum_at(x, more, i);
            _mm512_storeu_ps(sum + i, some);
            squares = _mm512_fmadd_ps(some, some, squares);
        }
        __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)k + (float)eps));
        for (long i = 0; i < k; i += 16) {
            __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(sum + r * k + i), scale);
            _mm512_storeu_ps(normed + r * k + i, _mm512_mul_ps(scaled, _mm512_loadu_ps(weight + i)));
        }
        for (long n = 0; n < to->groups; n++) prepare_group(w, to, r, n);
    }
    if (m > 1) team_wait(all);
}

/* A head x [D] by cosines and signed sines [D] -> to: x cos + roll(x, D / 2) sin. D is even; `to` may be x. */
static void turn(const float *x, const float *cosines, const float *sines, long d, float *to) {
    long half = d / 2;
    for (long i = 0; i < half; i += 16) {
        __mmask16 some = half - i < 16 ? (__mmask16)((1 << (half - i)) - 1) : (__mmask16)0xffff;
        __m512 low = _mm512_maskz_loadu_ps(some, x + i), high = _mm512_maskz_loadu_ps(some, x + half + i);
        __m512 a = _mm512_mul_ps(low, _mm512_maskz_loadu_ps(some, cosines + i));
        __m512 b = _mm512_mul_ps(high, _mm512_maskz_loadu_ps(some, cosines + half + i));
        _mm512_mask_storeu_ps(to + i, some, _mm512_fmadd_ps(high, _mm512_maskz_loadu_ps(some, sines + i), a));
        _mm512_mask_storeu_ps(to + half + i, some, _mm512_fmadd_ps(low, _mm512_maskz_loadu_ps(some, sines + half + i), b));
    }
}

/* To work in. A thread has what is of the states for itself where there is one row (team_norm); all else is of the team.
 *
 * Floats [m, the widest]: what goes into a map and what comes out of it, beside it what inputs_in needs; [m, C] product: the first
 * sum of a layer, before, after: the states that go into it and into its feed-forward block, normed: these as they go into a map.
 */
typedef struct {
    float *in, *out, *product;
    void *beside;
    float *before, *after, *normed;
    void *beside_normed;
    size_t own; /* bytes of what a thread has for itself */
} room;

static size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* head: NULL = there is none. Its `in` is NULL where there is no memory; to be freed. */
static room room_for(long m, const layer *const *some, long count, const layer *head, int threads) {
    long widest_in = 0, widest_out = 0, c = 0;
    size_t bytes = 0;
    for (long i = 0; i <= count; i++) {
        const layer *one = i < count ? some[i] : head;
        if (!one) continue;
        const map *maps[] = {&one->qkv, &one->out, &one->gate_up, &one->down};
        for (int j = 0; j < 4; j++) {
            if (!maps[j]->codes) continue;
            widest_in = most(widest_in, maps[j]->k);
            widest_out = most(widest_out, j < 2 ? 0 : maps[j]->n); /* the others have rooms of their own */
            bytes = most(bytes, inputs_bytes(maps[j], m));
        }
        c = most(c, one->qkv.k);
    }
    const size_t row = whole_lines(m * c * sizeof(float)), in = whole_lines(m * widest_in * sizeof(float));
    const size_t out = whole_lines(m * widest_out * sizeof(float)), beside = whole_lines(bytes);
    room made = {.own = 3 * row + beside};
    char *at = aligned_alloc(64, in + out + row + beside + made.own * (m == 1 ? threads : 1));
    if (!at) return made;
    made.in = (float *)at;
    made.out = (float *)(at += in);
    made.product = (float *)(at += out);
    made.beside = at += row;
    made.before = (float *)(at += beside);
    made.after = (float *)(at += row);
    made.normed = (float *)(at += row);
    made.beside_normed = at + row;
    return made;
}

/* As the calling thread has it. */
static room room_of_thread(room all, long m) {
    const size_t by = m == 1 ? all.own * omp_get_thread_num() : 0;
    all.before = (float *)((char *)all.before + by);
    all.after = (float *)((char *)all.after + by);
    all.normed = (float *)((char *)all.normed + by);
    all.beside_normed = (char *)all.beside_normed + by;
    return all;
}

/* Norm and first product of a layer: hidden + more [m, C] (NULL: hidden) -> `at->before`, heads [m, N]. */
static void team_before(const layer *l, const float *hidden, const float *more, long m, float *heads, const room *at,
                        meeting *all) {
    const inputs given = inputs_in(at->beside_normed, at->normed, m, &l->qkv);
    team_norm(hidden, more, l->norm_in, l->eps_in, m, &l->qkv, at->normed, &given, at->before, all);
    team_multiply(&l->qkv, &given, m, heads, all);
}

/* Queries and keys of heads [m, N] are turned where they are. */
static void team_turn(const layer *l, float *heads, const float *cosines, const float *sines, long m, meeting *all) {
#pragma omp for schedule(static) nowait
    for (long i = 0; i < m * l->turned; i++) {
        long r = i / l->turned, head = i % l->turned;
        float *x = heads + r * l->qkv.n + head * l->width;
        turn(x, cosines + r * l->width, sines + r * l->width, l->width, x);
    }
    team_wait(all);
}

/* What follows the attention, whose outcome [m, Hq D] is prepared for its map in `mixed`: hidden [m, C] -> what comes out is
 * `at->after` plus `at->out`.
 */
static void team_after(const layer *l, const inputs *mixed, const float *hidden, long m, const room *at, meeting *all) {
    const long f = l->down.k;
    team_multiply(&l->out, mixed, m, at->product, all);
    inputs given = inputs_in(at->beside_normed, at->normed, m, &l->gate_up);
    team_norm(hidden, at->product, l->norm_mlp, l->eps_mlp, m, &l->gate_up, at->normed, &given, at->after, all);
    team_multiply(&l->gate_up, &given, m, at->out, all);
    given = inputs_in(at->beside, at->in, m, &l->down);
#pragma omp for schedule(static) nowait
    for (long j = 0; j < m * given.groups; j++) {
        const long r = j / given.groups, n = j % given.groups;
        const float *gate = at->out + r * 2 * f, *up = gate + f;
        for (long i = n * l->down.group; i < f && i < (n + 1) * l->down.group; i += 16) {
            __m512 x = _mm512_loadu_ps(gate + i);
            __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
            _mm512_storeu_ps(at->in + r * f + i, _mm512_mul_ps(_mm512_div_ps(x, below), _mm512_loadu_ps(up + i)));
        }
        prepare_group(&l->down, &given, r, n);
    }
    team_wait(all);
    team_multiply(&l->down, &given, m, at->out, all);
}

/* x + more -> sum, `count` numbers. */
static void team_add(const float *x, const float *more, long count, float *sum, meeting *all) {
#pragma omp for schedule(static) nowait
    for (long i = 0; i < count; i += 16) _mm512_storeu_ps(sum + i, sum_at(x, more, i));
    team_wait(all);
}
#endif
