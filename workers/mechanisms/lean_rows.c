/* Decoder layers of the Llama kind for a few rows (lean_layer.h) from one attention to the next in one parallel region; and whole
 * layers and steps in one where every row is a single new token and the cache is plain.
 *
 * Shapes: m rows, C hidden width, Hq query heads, H key-value heads, D head width, S entries, V vocabulary.
 */
#include "lean_layer.h"

#ifdef INTEGER_PRODUCTS
enum { NO_MEMORY = 1, NO_SUCH_TOKEN, NO_SUCH_POSITION }; /* why a call did nothing */

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

/* To work in where layers are whole: heads [m, (Hq + 2 H) D], mixed [m, Hq D], embeddings [m, C], angles [2, m, D], scores
 * [threads, SHARING, stride], the attention of a layer.
 */
typedef struct {
    room at;
    float *heads, *mixed, *embedded, *angles, *scores;
    long stride;
    attended done;
} workshop;

/* Its `at.in` is NULL where there is no memory. */
static workshop workshop_for(const layer *const *layers, long count, const layer *head, const memory *memories, long m,
                             int threads) {
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
int step(const layer *const *layers, long count, const memory *memories, const double *scales, const ends *around,
         const int64_t *ids, const int64_t *positions, long m, float *logits, int threads) {
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
