/* Decoder layers of the Llama kind for a few rows: norms, products with packed weights (packed_rows.h), rotary turns, SiLU,
 * residuals from one attention to the next in one parallel region; and whole layers in one where every row is a single new token
 * and the cache is plain.
 *
 * Shapes: m rows, C hidden width, Hq query heads, H key-value heads, D head width, F width of the feed-forward block, S entries.
 */
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

enum { NO_MEMORY = 1, NO_SUCH_TOKEN, NO_SUCH_POSITION }; /* why a call did nothing */

static long most(long a, long b) { return a > b ? a : b; }

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

/* head: NULL = there is none. */
static room room_for(long m, const layer *const *some, long count, const layer *head) {
    long widest_in = 0, widest_out = 0;
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

/* To work in where layers are whole: heads [m, (Hq + 2 H) D], mixed [m, Hq D], states [4, m, C], angles [2, m, D] and scores
 * [threads, stride].
 */
typedef struct {
    room at;
    float *heads, *mixed, *states, *angles, *scores;
    long stride;
} workshop;

/* Its `at.in` is NULL where there is no memory. */
static workshop workshop_for(const layer *const *layers, long count, const layer *head, const memory *memories, long m, int threads) {
    const long d = layers[0]->width, wide = layers[0]->qkv.n, kept = wide / d - layers[0]->turned, c = layers[0]->qkv.k;
    const long mixed = (layers[0]->turned - kept) * d;
    long longest = 0;
    for (long i = 0; i < count * kept; i++) longest = most(longest, memories[i].length);
    workshop made = {.stride = longest + 1 + 2 * BLOCK};
    made.heads = malloc((m * (wide + mixed + 4 * c + 2 * d) + threads * made.stride) * sizeof(float));
    if (!made.heads) return made;
    made.mixed = made.heads + m * wide;
    made.states = made.mixed + m * mixed;
    made.angles = made.states + 4 * m * c;
    made.scores = made.angles + 2 * m * d;
    made.at = room_for(m, layers, count, head);
    if (!made.at.in) free(made.heads);
    return made;
}

static void leave(const workshop *done) {
    free(done->at.in);
    free(done->heads);
}

/* Layers one after the other: hidden [m, C] -> out [m, C]; the first two of the states are in use. */
static void team_layers(const layer *const *layers, long count, const memory *memories, const double *scales, const float *hidden,
                        const float *cosines, const float *sines, long m, float *out, const workshop *in, meeting *all) {
    const long kept = layers[0]->qkv.n / layers[0]->width - layers[0]->turned, c = layers[0]->qkv.k;
    for (long i = 0; i < count; i++) {
        float *to = i == count - 1 ? out : in->states + i % 2 * m * c;
        team_before(layers[i], hidden, cosines, sines, m, in->heads, in->at, all);
        team_attend(layers[i], memories + i * kept, in->heads, m, (float)scales[i], in->scores, in->stride, in->mixed, all);
        team_after(layers[i], in->mixed, hidden, m, to, in->at, all);
        hidden = to;
    }
}

/* All of some layers of one shape, of a known width, for m rows of one new token each: hidden [m, C] -> out [m, C]. The new entries
 * are written behind those of the memories [count, H]; scales: of the logits, [count]; cosines, sines: [m, D]. Not 0: no memory.
 */
int through(const layer *const *layers, long count, const memory *memories, const double *scales, const float *hidden,
            const float *cosines, const float *sines, long m, float *out, int threads) {
    const workshop in = workshop_for(layers, count, NULL, memories, m, threads);
    if (!in.at.in) return NO_MEMORY;
    meeting all = {0};
#pragma omp parallel num_threads(threads)
    team_layers(layers, count, memories, scales, hidden, cosines, sines, m, out, &in, &all);
    leave(&in);
    return 0;
}

/* What stands before and behind the layers of a model, as workers.mechanisms.lean_maps.Ends lays it out. */
typedef struct {
    const float *rows;            /* embeddings [V, C]; NULL: */
    const int8_t *codes;          /* in 8 bits [V, C] */
    const uint16_t *scales;       /* bfloat16 [V] */
    int64_t vocabulary;           /* V */
    const float *cosines, *sines; /* [positions, D] */
    int64_t positions;
    layer head;
} ends;

static void embed(const ends *by, int64_t id, long c, float *to) {
    if (by->rows) {
        memcpy(to, by->rows + id * c, c * sizeof(float));
        return;
    }
    const int8_t *codes = by->codes + id * c;
    const float scale = widened(by->scales[id]);
    for (long i = 0; i < c; i++) to[i] = (float)codes[i] * scale;
}

/* As `through`, from token ids [m] at positions [m] to logits [m, V]. Not 0: why nothing was done. */
int step(const layer *const *layers, long count, const memory *memories, const double *scales, const ends *around, const int64_t *ids,
         const int64_t *positions, long m, float *logits, int threads) {
    const long c = layers[0]->qkv.k, d = layers[0]->width;
    for (long r = 0; r < m; r++) {
        if (ids[r] < 0 || ids[r] >= around->vocabulary) return NO_SUCH_TOKEN;
        if (positions[r] < 0 || positions[r] >= around->positions) return NO_SUCH_POSITION;
    }
    const workshop in = workshop_for(layers, count, &around->head, memories, m, threads);
    if (!in.at.in) return NO_MEMORY;
    float *hidden = in.states + 2 * m * c, *last = hidden + m * c, *cosines = in.angles, *sines = cosines + m * d;
    for (long r = 0; r < m; r++) {
        embed(around, ids[r], c, hidden + r * c);
        memcpy(cosines + r * d, around->cosines + positions[r] * d, d * sizeof(float));
        memcpy(sines + r * d, around->sines + positions[r] * d, d * sizeof(float));
    }
    meeting all = {0};
#pragma omp parallel num_threads(threads)
    {
        team_layers(layers, count, memories, scales, hidden, cosines, sines, m, last, &in, &all);
        team_before(&around->head, last, NULL, NULL, m, logits, in.at, &all);
    }
    leave(&in);
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
    const room at = room_for(m, some, 2, NULL);
    if (!at.in) return NO_MEMORY;
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
