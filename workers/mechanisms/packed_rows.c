#include "packed_rows.h"

#ifdef INTEGER_PRODUCTS
/* x [m, K] -> y [m, N]. Not 0: no memory. */
int product(const map *w, const float *x, long m, float *y, int threads) {
    long groups = groups_of(w->k, w->group);
    void *room = malloc(rounded_bytes(m, w->k, groups));
    if (!room) return 1;
    rounded given = rounded_in(room, m, groups);
#pragma omp parallel num_threads(threads) if (w->n * w->k > SMALL)
    {
        team_round(x, m, w, &given);
        team_multiply(w, &given, m, y);
    }
    free(room);
    return 0;
}

int available(void) { return 1; }
#else
int available(void) { return 0; }
#endif
