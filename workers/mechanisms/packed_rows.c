#include "packed_rows.h"

#ifdef INTEGER_PRODUCTS
/* x [m, K] -> y [m, N]. Not 0: no memory. */
int product(const map *w, const float *x, long m, float *y, int threads) {
    void *room = malloc(inputs_bytes(w, m));
    if (!room) return 1;
    inputs given = inputs_in(room, x, m, w);
    meeting all = {0};
#pragma omp parallel num_threads(threads) if (w->n * w->k > SMALL)
    {
        team_prepare(w, &given, m, &all);
        team_multiply(w, &given, m, y, &all);
    }
    free(room);
    return 0;
}

int available(void) { return 1; }
#else
int available(void) { return 0; }
#endif
