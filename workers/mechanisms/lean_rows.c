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

static __m512 sum_at(const float *x, const float *more, long i) {
    __m512 some = _mm512_loadu_ps(x + i);
    return more ? _mm512_add_ps(some, _mm512_loadu_ps(more + i)) : some;
}

/* RMSNorm of x + more [m, C] (more NULL: of x), ready for the map; sum: x + more itself, neither of the two. A single row every thread
 * has for itself: that takes less than to fetch what another one did.
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
 * Floats [m, the widest]: what goes into a map and what comes out of it, beside it what inputs_in needs; [m, C] product: the first sum
 * of a layer, before, after: the states that go into it and into its feed-forward block, normed: these as they go into a map.
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
static void team_before(const layer *l, const float *hidden, const float *more, long m, float *heads, const room *at, meeting *all) {
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

/* What follows the attention, whose outcome [m, Hq D] is prepared for its map in `mixed`: hidden [m, C] -> what comes out is `at->after`
 * plus `at->out`.
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

/* Where all queries of a layer stand: [m, Hq, parts] in `done`, `count` parts each. */
typedef struct {
    partial *done;
    long count;
} attended;

/* Heads [m, Hq + 2 H, D]: queries and keys are turned, keys and values become the newest entries, and every query attends.
 *
 * some: [H] of this layer; scores: [threads, SHARING, stride].
 */
static void team_attend(const layer *l, const memory *some, const float *heads, const float *cosines, const float *sines, long m,
                        float scale, float *scores, long stride, const attended *to, meeting *all) {
    const long d = l->width, kept = l->qkv.n / d - l->turned, queries = l->turned - kept, share = queries / kept;
#pragma omp for schedule(static) nowait
    for (long i = 0; i < m * kept * to->count; i++) {
        const long r = i / (kept * to->count), head = i / to->count % kept, part = i % to->count;
        const memory *at = some + head;
        const long s = at->length + 1, each = ((s + to->count - 1) / to->count + 3) / 4 * 4, first = part * each;
        const long stop = first + each < s ? first + each : s;
        float *room = scores + omp_get_thread_num() * SHARING * stride;
        float *keys = at->keys + r * at->row, *values = at->values + r * at->row, asking[SHARING * 16 * WIDEST];
        const float *row = heads + r * l->qkv.n, *cos = cosines + r * d, *sin = sines + r * d;
        if (first < s && s <= stop) {
            turn(row + (queries + head) * d, cos, sin, d, keys + (s - 1) * d);
            memcpy(values + (s - 1) * d, row + (queries + kept + head) * d, d * sizeof(float));
        }
        for (long q = head * share, n; q < (head + 1) * share; q += n) {
            partial *mine[SHARING];
            n = (head + 1) * share - q < SHARING ? (head + 1) * share - q : SHARING;
            for (long g = 0; g < n; g++) {
                mine[g] = to->done + (r * queries + q + g) * to->count + part;
                *mine[g] = (partial){-INFINITY, 0, mine[g]->mixed};
                turn(row + (q + g) * d, cos, sin, d, asking + g * d);
                for (long c = 0; c < d; c += 16)
                    _mm512_storeu_ps(asking + g * d + c, _mm512_mul_ps(_mm512_loadu_ps(asking + g * d + c), _mm512_set1_ps(scale)));
            }
            if (first < s) /* else nothing is left for this part */
                attention_of(d, n)(asking, keys + first * d, values + first * d, stop - first, room, stride, mine);
        }
    }
    team_wait(all);
}

/* All parts of all queries together -> mixed [m, Hq D], prepared for the map that follows. */
static void team_unite(const layer *l, const attended *from, float *mixed, const inputs *to, long m, meeting *all) {
    const long k = l->out.k, d = l->width;
#pragma omp for schedule(static) nowait
    for (long j = 0; j < m * to->groups; j++) {
        const long r = j / to->groups, n = j % to->groups;
        for (long i = n * l->out.group; i < k && i < (n + 1) * l->out.group; i += 16)
            _mm512_storeu_ps(mixed + r * k + i, united(from->done + (r * (k / d) + i / d) * from->count, from->count, i % d));
        prepare_group(&l->out, to, r, n);
    }
    team_wait(all);
}

int knows_width(long d) { return attention_of(d, 1) != NULL; }

/* To work in where layers are whole: heads [m, (Hq + 2 H) D], mixed [m, Hq D], embeddings [m, C], angles [2, m, D], scores [threads, SHARING, stride], the attention of a layer.
 */
typedef struct {
    room at;
    float *heads, *mixed, *embedded, *angles, *scores;
    long stride;
    attended done;
} workshop;

/* Its `at.in` is NULL where there is no memory. */
static workshop workshop_for(const layer *const *layers, long count, const layer *head, const memory *memories, long m, int threads) {
    const long d = layers[0]->width, wide = layers[0]->qkv.n, kept = wide / d - layers[0]->turned, c = layers[0]->qkv.k;
    const long mixed = (layers[0]->turned - kept) * d;
    long longest = 0;
    for (long i = 0; i < count * kept; i++) longest = most(longest, memories[i].length + 1);
    workshop made = {.stride = most(longest, PART) + 2 * BLOCK, .done.count = parts_of(longest)};
    const long partials = mixed / d * m * made.done.count;
    made.done.done = malloc(partials * sizeof(partial) +
                            (partials * d + m * (wide + mixed + c + 2 * d) + threads * SHARING * made.stride) * sizeof(float));
    if (!made.done.done) return made;
    float *free_from = (float *)(made.done.done + partials);
    for (long i = 0; i < partials; i++, free_from += d) made.done.done[i].mixed = free_from;
    made.heads = free_from;
    made.mixed = made.heads + m * wide;
    made.embedded = made.mixed + m * mixed;
    made.angles = made.embedded + m * c;
    made.scores = made.angles + 2 * m * d;
    made.at = room_for(m, layers, count, head, threads);
    if (!made.at.in) free(made.done.done);
    return made;
}

static void leave(const workshop *done) {
    free(done->at.in);
    free(done->done.done);
}

/* Layers one after the other: hidden [m, C] -> what comes out is `at->after` plus `at->out`. */
static void team_layers(const layer *const *layers, long count, const memory *memories, const double *scales, const float *hidden,
                        const float *cosines, const float *sines, long m, const workshop *in, const room *at, meeting *all) {
    const long kept = layers[0]->qkv.n / layers[0]->width - layers[0]->turned;
    for (long i = 0; i < count; i++) {
        const layer *l = layers[i];
        const inputs given = inputs_in(at->beside, in->mixed, m, &l->out);
        team_before(l, i ? at->after : hidden, i ? at->out : NULL, m, in->heads, at, all);
        team_attend(l, memories + i * kept, in->heads, cosines, sines, m, (float)scales[i], in->scores, in->stride, &in->done, all);
        team_unite(l, &in->done, in->mixed, &given, m, all);
        team_after(l, &given, at->before, m, at, all);
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
    {
        const room at = room_of_thread(in.at, m);
        team_layers(layers, count, memories, scales, hidden, cosines, sines, m, &in, &at, &all);
        team_add(at.after, at.out, m * layers[0]->qkv.k, out, &all);
    }
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
    float *cosines = in.angles, *sines = cosines + m * d;
    for (long r = 0; r < m; r++) {
        embed(around, ids[r], c, in.embedded + r * c);
        memcpy(cosines + r * d, around->cosines + positions[r] * d, d * sizeof(float));
        memcpy(sines + r * d, around->sines + positions[r] * d, d * sizeof(float));
    }
    meeting all = {0};
#pragma omp parallel num_threads(threads)
    {
        const room at = room_of_thread(in.at, m);
        team_layers(layers, count, memories, scales, in.embedded, cosines, sines, m, &in, &at, &all);
        team_before(&around->head, at.after, at.out, m, logits, &at, &all);
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
    const room of_all = room_for(m, some, 2, NULL, threads);
    if (!of_all.in) return NO_MEMORY;
    meeting all = {0};
#pragma omp parallel num_threads(threads)
    {
        const room at = room_of_thread(of_all, m);
        if (last) {
            const inputs given = inputs_in(at.beside, mixed, m, &last->out);
            team_prepare(&last->out, &given, m, &all);
            team_after(last, &given, hidden, m, &at, &all);
            team_add(at.after, at.out, m * last->down.n, out, &all);
        }
        if (next) team_before(next, last ? out : hidden, NULL, m, heads, &at, &all);
        if (next && next->turned) team_turn(next, heads, cosines, sines, m, &all);
    }
    free(of_all.in);
    return 0;
}
#endif
