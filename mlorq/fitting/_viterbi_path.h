/* The best path through the trellis, for vectors of LANES floats: _viterbi.c includes this file once for every width.

   LANES: floats of a vector.  TARGET: attribute of the functions.  NAMED(name): the function's name for this width. */

#define INLINE_HERE INLINE TARGET

typedef int32_t NAMED(lanes) __attribute__((vector_size(4 * LANES)));
typedef float NAMED(floats) __attribute__((vector_size(4 * LANES), aligned(4)));
typedef float NAMED(half) __attribute__((vector_size(2 * LANES), aligned(4)));

/* x[0] 2^k times, then x[1], and so on, for 2^k < LANES; what follows in x is read, too. */
INLINE_HERE NAMED(floats) NAMED(repeated)(const float *x, const int k)
{
#if HAS_SHUFFLE && LANES == 16
    const NAMED(half) from = *(const NAMED(half) *)x;
    if (k == 3)
        return __builtin_shufflevector(from, from, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    if (k == 2)
        return __builtin_shufflevector(from, from, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return __builtin_shufflevector(from, from, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
#elif HAS_SHUFFLE && LANES == 8
    const NAMED(half) from = *(const NAMED(half) *)x;
    if (k == 2)
        return __builtin_shufflevector(from, from, 0, 0, 0, 0, 1, 1, 1, 1);
    return __builtin_shufflevector(from, from, 0, 0, 1, 1, 2, 2, 3, 3);
#else
    NAMED(floats) found;
    for (int i = 0; i < LANES; i++)
        found[i] = x[i >> k];
    return found;
#endif
}

/* Metrics of the paths that end in LANES consecutive states.

   survivor: of the first of them, and following.  values: of the states. */
INLINE_HERE NAMED(floats) NAMED(extended)(const float *survivor, const float *values, const float x, const float w,
                                          const int k)
{
    const NAMED(floats) error = x - *(const NAMED(floats) *)values;
    if (1 << k >= LANES)
        return *survivor + w * error * error;
    return NAMED(repeated)(survivor, k) + w * error * error;
}

INLINE_HERE NAMED(lanes) NAMED(lesser)(const NAMED(lanes) one, const NAMED(lanes) other)
{
    NAMED(lanes) found;
    for (int i = 0; i < LANES; i++)
        found[i] = one[i] < other[i] ? one[i] : other[i];
    return found;
}

/* The least of the paths to all states that differ in their oldest bits j alone. Metrics are non-negative floats, which
   are ordered like their bit patterns; the low k bits of a survivor hold j. Metrics of single states stay in registers.

   next: survivors after the step.  back: their j.  sorted: values of the states, in the order in which they are read. */
INLINE_HERE void NAMED(step)(const float *restrict survivor, int32_t *restrict next, uint8_t *restrict back,
                             const float *restrict sorted, const float x, const float w, const int k, const int states)
{
    const int many = 1 << k, count = states >> k;
    const int32_t clear = -many;
    for (int q = 0; q < count; q += LANES) {
        const float *from = survivor + (q >> k);
        NAMED(lanes) least = (NAMED(lanes))NAMED(extended)(from, sorted, x, w, k) & clear;
        sorted += LANES;
#if defined(__GNUC__)
#pragma GCC unroll 8
#endif
        for (int j = 1; j < many; j++, sorted += LANES) {
            from += count >> k;
            least = NAMED(lesser)(((NAMED(lanes))NAMED(extended)(from, sorted, x, w, k) & clear) | j, least);
        }
        *(NAMED(lanes) *)(next + q) = least;
    }
    for (int q = 0; q < count; q++)
        back[q] = (uint8_t)(next[q] & (many - 1));
}

INLINE_HERE void NAMED(renormalise)(float *restrict survivor, const int count)
{
    float least = survivor[0];
    for (int q = 1; q < count; q++)
        least = survivor[q] < least ? survivor[q] : least;
    for (int q = 0; q < count; q++)
        survivor[q] = survivor[q] - least;
}

/* The states of the best path; edge: the low bits that the state before the first step and the last state share, or -1. */
INLINE_HERE void NAMED(best_path)(const float *x, const float *w, const int steps, const int edge, const float *table,
                                  const int k, uint16_t *states, const Workspace *space)
{
    const int count = space->states >> k;
    float *metric = space->metric, *survivor = space->survivor, *next = space->next;
    for (int q = 0; q < count; q++)
        survivor[q] = edge < 0 || q == edge ? 0.f : UNREACHABLE;
    for (int t = 0; t < steps; t++) {
        if (t % RENORMALISE == RENORMALISE - 1)
            NAMED(renormalise)(survivor, count);
        if (t == steps - 1)
            break;
        uint8_t *back = space->back + (size_t)(t + 1) * count;
        NAMED(step)(survivor, (int32_t *)next, back, space->sorted, x[t], w[t], k, space->states);
        float *before = survivor;
        survivor = next;
        next = before;
    }
    const float last = x[steps - 1], weight = w[steps - 1];
    for (int s = 0; s < space->states; s += LANES)
        *(NAMED(floats) *)(metric + s) = NAMED(extended)(survivor + (s >> k), table + s, last, weight, k);
    int best = edge < 0 ? 0 : edge;
    const int stride = edge < 0 ? 1 : count;
    for (int s = best + stride; s < space->states; s += stride)
        if (metric[s] < metric[best])
            best = s;
    for (int t = steps - 1; t >= 0; t--) {
        states[t] = (uint16_t)best;
        if (t)
            best = (int)space->back[(size_t)t * count + (best >> k)] * count + (best >> k);
    }
}

/* edge: the bits that the ends of the cycle share, or -1: found by a pass around it. */
INLINE_HERE void NAMED(bite_tail)(const float *x, const float *w, const int rows, const int edge, const float *table,
                                  const int k, uint16_t *states, const Workspace *space)
{
    if (edge >= 0) {
        NAMED(best_path)(x, w, rows, edge, table, k, states, space);
        return;
    }
    const int half = rows / 2 < WINDOW ? rows / 2 : WINDOW;
    float *around = space->rotated, *weights = space->rotated + 2 * half;
    for (int t = 0; t < 2 * half; t++) {
        const int from = t < half ? rows - half + t : t - half;
        around[t] = x[from];
        weights[t] = w[from];
    }
    NAMED(best_path)(around, weights, 2 * half, -1, table, k, states, space);
    NAMED(best_path)(x, w, rows, states[half - 1] & ((STATES >> k) - 1), table, k, states, space);
}

/* The states of a column: k is a constant in every branch. */
TARGET static void NAMED(encode)(const float *x, const float *w, int rows, int edge, const float *table, int k,
                                 uint16_t *states, const Workspace *space)
{
    switch (k) {
    case 1: NAMED(bite_tail)(x, w, rows, edge, table, 1, states, space); break;
    case 2: NAMED(bite_tail)(x, w, rows, edge, table, 2, states, space); break;
    case 3: NAMED(bite_tail)(x, w, rows, edge, table, 3, states, space); break;
    case 4: NAMED(bite_tail)(x, w, rows, edge, table, 4, states, space); break;
    case 5: NAMED(bite_tail)(x, w, rows, edge, table, 5, states, space); break;
    default: NAMED(bite_tail)(x, w, rows, edge, table, 6, states, space);
    }
}

/* The table in the order in which a step reads it: for LANES survivors after another, the states of every j. */
static void NAMED(sort)(const float *table, int k, float *sorted)
{
    for (int q = 0; q < STATES >> k; q += LANES)
        for (int j = 0; j < 1 << k; j++, sorted += LANES)
            memcpy(sorted, table + j * (STATES >> k) + q, LANES * sizeof(float));
}

#undef INLINE_HERE
