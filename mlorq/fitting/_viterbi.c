/* Viterbi coding of columns under error feedback: the inner loops of mlorq.fitting.viterbi, which documents them and has
   the same functions in NumPy. Both give the same codes: every operation is one rounding of single precision, in the same
   order, so this file is compiled without contraction to fused multiply-adds. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define STATE_BITS 12
#define STATES (1 << STATE_BITS)
#define MOST_BITS 6
#define WINDOW 64            /* of the pass that finds the edge, to either side of it */
#define RENORMALISE 32       /* steps between subtractions of the least path metric */
#define UNREACHABLE 1e30f

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#define ALIGNMENT 64 /* of the arrays: loads that straddle cache lines take twice as long */

typedef struct {
    int states; /* read at run time: with a constant, compilers unroll the loops over states badly */
    void *memory;
    float *metric;    /* of every state */
    float *survivor;  /* least metric of the states that share all but their oldest bits */
    float *rotated;   /* the sequence and its weights around the edge */
    uint8_t *back;    /* the oldest bits of the survivor, by step */
} Workspace;

#define LANES 16
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));

/* Path metrics are non-negative floats, which are ordered like their bit patterns. The low k bits of a survivor hold the
   oldest bits j of its state. */
INLINE void survive(const int32_t *restrict metric, int32_t *restrict survivor, uint8_t *restrict back, const int k,
                    const int states)
{
    const int many = 1 << k, count = states >> k;
    const int32_t clear = -many;
    for (int q = 0; q < count; q += LANES) {
        lanes least = *(const lanes *)(metric + q) & clear;
        for (int j = 1; j < many; j++) {
            const lanes value = (*(const lanes *)(metric + (size_t)j * count + q) & clear) | j;
            const lanes less = value < least;
            least = (value & less) | (least & ~less);
        }
        *(lanes *)(survivor + q) = least;
    }
    for (int q = 0; q < count; q++)
        back[q] = (uint8_t)(survivor[q] & (many - 1));
}

INLINE void renormalise(float *restrict survivor, const int count)
{
    float least = survivor[0];
    for (int q = 1; q < count; q++)
        least = survivor[q] < least ? survivor[q] : least;
    for (int q = 0; q < count; q++)
        survivor[q] = survivor[q] - least;
}

INLINE void extend(const float *restrict survivor, float *restrict metric, const float *restrict table, float x, float w,
                   const int k, const int states)
{
    const int many = 1 << k, count = states >> k;
    if (k >= 4) { /* sixteen states share a survivor */
        for (int s = 0; s < states; s += LANES) {
            const floats error = x - *(const floats *)(table + s);
            *(floats *)(metric + s) = survivor[s >> k] + w * error * error;
        }
        return;
    }
    if (k == 1) {
        for (int q = 0; q < count; q++) {
            const float even = x - table[2 * q], odd = x - table[2 * q + 1];
            metric[2 * q] = survivor[q] + w * even * even;
            metric[2 * q + 1] = survivor[q] + w * odd * odd;
        }
        return;
    }
    for (int q = 0; q < count; q += 16 >> k) { /* sixteen states at a time */
        float from[16];
        for (int i = 0; i < 16; i++)
            from[i] = survivor[q + (i >> k)];
        for (int i = 0; i < 16; i++) {
            const float error = x - table[q * many + i];
            metric[q * many + i] = from[i] + w * error * error;
        }
    }
}

/* The states of the best path; edge: the low bits that the state before the first step and the last state share, or -1. */
INLINE void best_path(const float *x, const float *w, int steps, int edge, const float *table, const int k,
                      uint16_t *states, Workspace *space)
{
    const int count = space->states >> k;
    float *metric = space->metric, *survivor = space->survivor;
    for (int q = 0; q < count; q++)
        survivor[q] = edge < 0 || q == edge ? 0.f : UNREACHABLE;
    for (int t = 0; t < steps; t++) {
        if (t)
            survive((const int32_t *)metric, (int32_t *)survivor, space->back + (size_t)t * count, k, space->states);
        if (t % RENORMALISE == RENORMALISE - 1)
            renormalise(survivor, count);
        extend(survivor, metric, table, x[t], w[t], k, space->states);
    }
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
INLINE void bite_tail(const float *x, const float *w, int rows, int edge, const float *table, const int k,
                      uint16_t *states, Workspace *space)
{
    if (edge >= 0) {
        best_path(x, w, rows, edge, table, k, states, space);
        return;
    }
    const int half = rows / 2 < WINDOW ? rows / 2 : WINDOW;
    float *around = space->rotated, *weights = space->rotated + 2 * half;
    for (int t = 0; t < 2 * half; t++) {
        const int from = t < half ? rows - half + t : t - half;
        around[t] = x[from];
        weights[t] = w[from];
    }
    best_path(around, weights, 2 * half, -1, table, k, states, space);
    best_path(x, w, rows, states[half - 1] & ((STATES >> k) - 1), table, k, states, space);
}

FOR_EACH_CPU static void encode(const float *x, const float *w, int rows, int edge, const float *table, int k,
                                uint16_t *states, Workspace *space)
{
    switch (k) {
    case 1: bite_tail(x, w, rows, edge, table, 1, states, space); break;
    case 2: bite_tail(x, w, rows, edge, table, 2, states, space); break;
    case 3: bite_tail(x, w, rows, edge, table, 3, states, space); break;
    case 4: bite_tail(x, w, rows, edge, table, 4, states, space); break;
    case 5: bite_tail(x, w, rows, edge, table, 5, states, space); break;
    default: bite_tail(x, w, rows, edge, table, 6, states, space);
    }
}

/* later -= share * error (sign -1) or later += share * error (sign 1), for the columns after `column` of a block */
FOR_EACH_CPU static void spread(float *values, const float *shares, const float *error, int column, int columns, int rows,
                                float sign)
{
    for (int later = column + 1; later < columns; later++) {
        const float share = sign * shares[(size_t)column * columns + later];
        float *restrict own = values + (size_t)later * rows;
        for (int r = 0; r < rows; r++)
            own[r] = own[r] + share * error[r];
    }
}

static int allocate(Workspace *space, int rows, int k)
{
    const size_t window = 4 * WINDOW;
    const size_t floats = STATES + STATES / 2 + window;
    const size_t steps = rows > 2 * WINDOW ? rows : 2 * WINDOW;
    space->memory = malloc(floats * sizeof(float) + steps * (STATES >> k) + ALIGNMENT);
    if (space->memory == NULL)
        return 0;
    space->metric = (float *)(((uintptr_t)space->memory + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    space->states = STATES;
    space->survivor = space->metric + STATES;
    space->rotated = space->survivor + STATES / 2;
    space->back = (uint8_t *)(space->rotated + window);
    return 1;
}

typedef struct {
    Py_buffer values, matrix, weights, table, states, coded, errors;
    int columns, rows, k;
} Block;

static void release(Block *block)
{
    PyBuffer_Release(&block->values);
    PyBuffer_Release(&block->matrix);
    PyBuffer_Release(&block->weights);
    PyBuffer_Release(&block->table);
    PyBuffer_Release(&block->states);
    PyBuffer_Release(&block->coded);
    PyBuffer_Release(&block->errors);
}

static int parse(PyObject *arguments, Block *block)
{
    if (!PyArg_ParseTuple(arguments, "w*y*y*y*iw*w*w*", &block->values, &block->matrix, &block->weights, &block->table,
                          &block->k, &block->states, &block->coded, &block->errors))
        return 0;
    const Py_ssize_t size = sizeof(float);
    block->rows = (int)(block->weights.len / size);
    block->columns = block->rows ? (int)(block->values.len / (size * block->rows)) : 0;
    const Py_ssize_t entries = (Py_ssize_t)block->columns * block->rows;
    if (block->k < 1 || block->k > MOST_BITS || (Py_ssize_t)block->rows * block->k < STATE_BITS ||
        block->table.len != STATES * size || block->values.len != entries * size ||
        block->matrix.len != (Py_ssize_t)block->columns * block->columns * size ||
        block->states.len != entries * (Py_ssize_t)sizeof(uint16_t) || block->coded.len != entries * size ||
        block->errors.len != entries * size) {
        release(block);
        PyErr_SetString(PyExc_ValueError, "the arrays of a block do not fit each other");
        return 0;
    }
    return 1;
}

static PyObject *round_block(PyObject *module, PyObject *arguments)
{
    Block block;
    Workspace space;
    if (!parse(arguments, &block))
        return NULL;
    const int columns = block.columns, rows = block.rows;
    const float *shares = block.matrix.buf, *weights = block.weights.buf, *table = block.table.buf;
    int done = 0;
    Py_BEGIN_ALLOW_THREADS
    if (allocate(&space, rows, block.k)) {
        for (int c = 0; c < columns; c++) {
            const size_t at = (size_t)c * rows;
            float *own = (float *)block.values.buf + at, *coded = (float *)block.coded.buf + at;
            float *error = (float *)block.errors.buf + at;
            uint16_t *states = (uint16_t *)block.states.buf + at;
            const float pivot = shares[(size_t)c * columns + c];
            encode(own, weights, rows, -1, table, block.k, states, &space);
            for (int r = 0; r < rows; r++) {
                coded[r] = table[states[r]];
                error[r] = (own[r] - coded[r]) / pivot;
            }
            spread(block.values.buf, shares, error, c, columns, rows, -1.f);
        }
        free(space.memory);
        done = 1;
    }
    Py_END_ALLOW_THREADS
    release(&block);
    if (!done)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *descend_block(PyObject *module, PyObject *arguments)
{
    Block block;
    Workspace space;
    if (!parse(arguments, &block))
        return NULL;
    const int columns = block.columns, rows = block.rows;
    const float *hessian = block.matrix.buf, *weights = block.weights.buf, *table = block.table.buf;
    float *target = NULL;
    int done = 0;
    Py_BEGIN_ALLOW_THREADS
    target = malloc(rows * sizeof(float));
    if (target != NULL && allocate(&space, rows, block.k)) {
        for (int c = 0; c < columns; c++) {
            const size_t at = (size_t)c * rows;
            float *slope = (float *)block.values.buf + at, *coded = (float *)block.coded.buf + at;
            float *move = (float *)block.errors.buf + at;
            uint16_t *states = (uint16_t *)block.states.buf + at;
            const float diagonal = hessian[(size_t)c * columns + c];
            for (int r = 0; r < rows; r++)
                target[r] = coded[r] - slope[r] / diagonal;
            const int edge = states[rows - 1] & ((STATES >> block.k) - 1);
            encode(target, weights, rows, edge, table, block.k, states, &space);
            for (int r = 0; r < rows; r++) {
                const float found = table[states[r]];
                move[r] = found - coded[r];
                coded[r] = found;
            }
            spread(block.values.buf, hessian, move, c, columns, rows, 1.f);
        }
        free(space.memory);
        done = 1;
    }
    free(target);
    Py_END_ALLOW_THREADS
    release(&block);
    if (!done)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"round_block", round_block, METH_VARARGS, "See mlorq.fitting.viterbi.round_block."},
    {"descend_block", descend_block, METH_VARARGS, "See mlorq.fitting.viterbi.descend_block."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_viterbi", NULL, -1, functions};

PyMODINIT_FUNC PyInit__viterbi(void)
{
    return PyModule_Create(&definition);
}
