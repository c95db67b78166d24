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
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
#define HAS_SHUFFLE 1
#else
#define HAS_SHUFFLE 0
#endif

#define ALIGNMENT 64 /* of the arrays: loads that straddle cache lines take twice as long */
#define MOST_LANES 16

typedef struct {
    int states; /* read at run time: with a constant, compilers unroll the loops over states badly */
    void *memory;
    float *metric;   /* of every state */
    float *sorted;   /* values of the states, in the order in which a step reads them */
    float *survivor; /* least metric of the states that share all but their oldest bits */
    float *next;     /* the same after the next step */
    float *rotated;  /* the sequence and its weights around the edge */
    uint8_t *back;   /* the oldest bits of the survivor, by step */
} Workspace;

typedef struct {
    void (*encode)(const float *, const float *, int, int, const float *, int, uint16_t *, const Workspace *);
    void (*sort)(const float *, int, float *);
} Path;

/* A compiler lowers vectors that are wider than those of the function's own target to scalars, so that every width has
   functions of its own, inlined ones included. */
#if defined(__x86_64__) && defined(__GNUC__)
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define NAMED(name) name##_16
#include "_viterbi_path.h"
#undef LANES
#undef TARGET
#undef NAMED
#define LANES 8
#define TARGET __attribute__((target("avx2")))
#define NAMED(name) name##_8
#include "_viterbi_path.h"
#undef LANES
#undef TARGET
#undef NAMED
#endif
#define LANES 4
#define TARGET
#define NAMED(name) name##_4
#include "_viterbi_path.h"

/* For vectors of this many floats; without functions if the processor has none of this width. */
static Path path_of(const int lanes)
{
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (lanes == 16 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return (Path){encode_16, sort_16};
    if (lanes == 8 && __builtin_cpu_supports("avx2"))
        return (Path){encode_8, sort_8};
#endif
    return lanes == 4 ? (Path){encode_4, sort_4} : (Path){NULL, NULL};
}

static Path path; /* for the widest vectors of this processor */

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
    const size_t floats = 2 * STATES + 2 * (STATES / 2 + MOST_LANES) + window;
    const size_t steps = rows > 2 * WINDOW ? rows : 2 * WINDOW;
    space->memory = malloc(floats * sizeof(float) + steps * (STATES >> k) + ALIGNMENT);
    if (space->memory == NULL)
        return 0;
    space->metric = (float *)(((uintptr_t)space->memory + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    space->states = STATES;
    space->sorted = space->metric + STATES;
    space->survivor = space->sorted + STATES;
    space->next = space->survivor + STATES / 2 + MOST_LANES;
    space->rotated = space->next + STATES / 2 + MOST_LANES;
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
        path.sort(table, block.k, space.sorted);
        for (int c = 0; c < columns; c++) {
            const size_t at = (size_t)c * rows;
            float *own = (float *)block.values.buf + at, *coded = (float *)block.coded.buf + at;
            float *error = (float *)block.errors.buf + at;
            uint16_t *states = (uint16_t *)block.states.buf + at;
            const float pivot = shares[(size_t)c * columns + c];
            path.encode(own, weights, rows, -1, table, block.k, states, &space);
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
        path.sort(table, block.k, space.sorted);
        for (int c = 0; c < columns; c++) {
            const size_t at = (size_t)c * rows;
            float *slope = (float *)block.values.buf + at, *coded = (float *)block.coded.buf + at;
            float *move = (float *)block.errors.buf + at;
            uint16_t *states = (uint16_t *)block.states.buf + at;
            const float diagonal = hessian[(size_t)c * columns + c];
            for (int r = 0; r < rows; r++)
                target[r] = coded[r] - slope[r] / diagonal;
            const int edge = states[rows - 1] & ((STATES >> block.k) - 1);
            path.encode(target, weights, rows, edge, table, block.k, states, &space);
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

static PyObject *use_lanes(PyObject *module, PyObject *lanes)
{
    const Path found = path_of((int)PyLong_AsLong(lanes));
    if (PyErr_Occurred())
        return NULL;
    if (found.encode == NULL) {
        PyErr_SetString(PyExc_ValueError, "this processor has no vectors of this width");
        return NULL;
    }
    path = found;
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"round_block", round_block, METH_VARARGS, "See mlorq.fitting.viterbi.round_block."},
    {"descend_block", descend_block, METH_VARARGS, "See mlorq.fitting.viterbi.descend_block."},
    {"use_lanes", use_lanes, METH_O, "Use vectors of 4, 8 or 16 floats from now on; by default the widest possible."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_viterbi", NULL, -1, functions};

PyMODINIT_FUNC PyInit__viterbi(void)
{
    for (int lanes = MOST_LANES; path.encode == NULL; lanes /= 2)
        path = path_of(lanes);
    return PyModule_Create(&definition);
}
