/* Rounding of the columns of one block after another: the inner loops of mlorq.fitting.gptq, which documents them and has
   the same functions in torch. Rows are independent and taken some at a time, so that their values stay in the cache. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 64 /* at a time: of 64 columns they take 16 kB */
#define MAGIC 12582912.f /* 1.5 * 2^23: adding it rounds to integers, halves to even */

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

typedef struct {
    int columns, rows;
    float top;                  /* the largest code */
    float *values;              /* (columns, rows) */
    const float *matrix;        /* (columns, columns) */
    const float *scale, *zero;  /* (rows,) */
    float *codes, *results;     /* (columns, rows) */
} Block;

/* Values beyond 2^22 are far outside the range of codes, and are clamped to it whatever they round to. */
static inline float rounded(const float x)
{
    const float inside = x < -4194304.f ? -4194304.f : x > 4194304.f ? 4194304.f : x;
    return (inside + MAGIC) - MAGIC;
}

static inline float clamped(const float code, const float top)
{
    return code < 0.f ? 0.f : code > top ? top : code;
}

/* values += factor * change, for the columns after `column` */
static inline void spread(float *values, const float *restrict factors, const float *restrict change, const int column,
                          const int columns, const float sign)
{
    for (int later = column + 1; later < columns; later++) {
        const float factor = sign * factors[later];
        float *restrict own = values + later * ROWS;
        for (int r = 0; r < ROWS; r++)
            own[r] += factor * change[r];
    }
}

/* Rows from `first` on, at most ROWS of them, of a matrix of columns; the rest is filled. */
static inline void take(const float *restrict from, const int rows, const int first, const int columns, const float fill,
                        float *restrict to)
{
    const int count = rows - first < ROWS ? rows - first : ROWS;
    for (int c = 0; c < columns; c++) {
        memcpy(to + c * ROWS, from + (size_t)c * rows + first, count * sizeof(float));
        for (int r = count; r < ROWS; r++)
            to[c * ROWS + r] = fill;
    }
}

static inline void put(const float *restrict from, const int rows, const int first, float *restrict to)
{
    memcpy(to + first, from, (rows - first < ROWS ? rows - first : ROWS) * sizeof(float));
}

FOR_EACH_CPU static void round_columns(const Block *block, float *values)
{
    float scale[ROWS], zero[ROWS], codes[ROWS], errors[ROWS];
    const int columns = block->columns, rows = block->rows;
    for (int first = 0; first < rows; first += ROWS) {
        take(block->values, rows, first, columns, 0.f, values);
        take(block->scale, rows, first, 1, 1.f, scale);
        take(block->zero, rows, first, 1, 0.f, zero);
        for (int c = 0; c < columns; c++) {
            const float *own = values + c * ROWS, *shares = block->matrix + (size_t)c * columns;
            const float pivot = shares[c], top = block->top;
            for (int r = 0; r < ROWS; r++) {
                codes[r] = clamped(rounded(own[r] / scale[r]) + zero[r], top);
                errors[r] = (own[r] - (codes[r] - zero[r]) * scale[r]) / pivot;
            }
            put(codes, rows, first, block->codes + (size_t)c * rows);
            put(errors, rows, first, block->results + (size_t)c * rows);
            spread(values, shares, errors, c, columns, -1.f);
        }
    }
}

FOR_EACH_CPU static void descend_columns(const Block *block, float *values)
{
    float scale[ROWS], zero[ROWS], codes[ROWS], moves[ROWS];
    const int columns = block->columns, rows = block->rows;
    for (int first = 0; first < rows; first += ROWS) {
        take(block->values, rows, first, columns, 0.f, values);
        take(block->scale, rows, first, 1, 1.f, scale);
        take(block->zero, rows, first, 1, 0.f, zero);
        for (int c = 0; c < columns; c++) {
            const float *own = values + c * ROWS, *around = block->matrix + (size_t)c * columns;
            const float diagonal = around[c] > FLT_MIN ? around[c] : FLT_MIN, top = block->top;
            take(block->codes + (size_t)c * rows, rows, first, 1, 0.f, codes);
            for (int r = 0; r < ROWS; r++) {
                const float best = clamped(rounded(codes[r] - zero[r] - own[r] / (scale[r] * diagonal)) + zero[r], top);
                moves[r] = (best - codes[r]) * scale[r];
                codes[r] = best;
            }
            put(codes, rows, first, block->codes + (size_t)c * rows);
            put(moves, rows, first, block->results + (size_t)c * rows);
            spread(values, around, moves, c, columns, 1.f);
        }
    }
}

static PyObject *run(PyObject *arguments, void (*columns)(const Block *, float *))
{
    Py_buffer values, matrix, scale, zero, codes, results;
    int top;
    if (!PyArg_ParseTuple(arguments, "y*y*y*y*iw*w*", &values, &matrix, &scale, &zero, &top, &codes, &results))
        return NULL;
    Block block = {.top = (float)top, .values = values.buf, .matrix = matrix.buf, .scale = scale.buf, .zero = zero.buf,
                   .codes = codes.buf, .results = results.buf};
    const Py_ssize_t size = sizeof(float);
    block.rows = (int)(scale.len / size);
    block.columns = block.rows ? (int)(values.len / (size * block.rows)) : 0;
    const Py_ssize_t entries = size * block.rows * block.columns;
    const int fits = zero.len == scale.len && values.len == entries && codes.len == entries && results.len == entries &&
                     matrix.len == size * block.columns * block.columns;
    float *space = fits ? malloc((size_t)(block.columns ? block.columns : 1) * ROWS * sizeof(float)) : NULL;
    if (space != NULL) {
        Py_BEGIN_ALLOW_THREADS
        columns(&block, space);
        Py_END_ALLOW_THREADS
        free(space);
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&matrix);
    PyBuffer_Release(&scale);
    PyBuffer_Release(&zero);
    PyBuffer_Release(&codes);
    PyBuffer_Release(&results);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "the arrays of a block do not fit each other");
        return NULL;
    }
    if (space == NULL)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *gptq_block(PyObject *module, PyObject *arguments)
{
    (void)module;
    return run(arguments, round_columns);
}

static PyObject *descend_block(PyObject *module, PyObject *arguments)
{
    (void)module;
    return run(arguments, descend_columns);
}

static PyMethodDef functions[] = {
    {"gptq_block", gptq_block, METH_VARARGS, "See mlorq.fitting.gptq.gptq_block; values are not changed."},
    {"descend_block", descend_block, METH_VARARGS, "See mlorq.fitting.gptq.descend_block; the slope is not changed."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_columns", NULL, -1, functions};

PyMODINIT_FUNC PyInit__columns(void)
{
    return PyModule_Create(&definition);
}
