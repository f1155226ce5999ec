/* The time steps of the GRU, forwards and backwards.

   This file computes only what must be computed step by step; torch computes the matrix products of whole sequences.
   Each thread takes some of the lanes through all of the steps, so threads never wait for each other. A tile of lanes
   and hidden units is multiplied in registers, and the pointwise work is done there before anything is stored. A row's
   sums are added in one order, whatever the tile, so a lane's bits depend neither on the number of threads nor on the
   other lanes.

   native.py compiles it for the machine it runs on: with -DBF16 for bf16 factors, which needs AVX512-BF16, else for
   fp32. T time steps, B lanes, H hidden width, a multiple of UNITS. Equations and order of the gates: gru_layer.py. */

#include <omp.h>

#include "factors.h"

#if defined(__AVX512F__) || defined(__aarch64__)
enum { ROWS = 8 }; /* lanes in a tile, whose sums nearly fill the registers */
#else
enum { ROWS = 4 };
#endif

typedef struct {
    int64_t T, B, H;
    const factor *into;    /* [T, B, 3 H] matrix products of the inputs: n, r, z */
    const float *bias;     /* [4 H] n, r, z, s */
    const factor *weights; /* [H / WIDTH, H / DEPTH, 3, WIDTH, DEPTH] of r, z, s */
    factor *nrs;           /* [T, B, 3 H] gates for backward: n, r, s; NULL if not needed */
    float *z;              /* [T, B, H] z in fp32: near 1, rounding to bf16 would lose 1 - z */
    float *states;         /* [T + 1, B, H], of which the first is input */
    factor *rounded;       /* [T + 1, B, H] the states as factors; may be the states themselves */
} Forward;

/* Compute the states after step t of `rows` lanes from `lane` on, and of WIDTH units from `unit` on. */
static inline __attribute__((always_inline)) void step_forward(const Forward *f, int64_t t, int64_t lane,
                                                               int64_t unit, const int rows) {
    const int64_t H = f->H;
    const factor *weights = f->weights + unit * H * 3;
    const factor *before = f->rounded + (t * f->B + lane) * H;
    vec sum[ROWS][3];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
        for (int gate = 0; gate < 3; gate++) sum[row][gate] = load(f->bias + (gate + 1) * H + unit);
    for (int64_t k = 0; k < H; k += DEPTH, weights += 3 * WIDTH * DEPTH) {
        const factors r = load_factors(weights), z = load_factors(weights + WIDTH * DEPTH);
        const factors s = load_factors(weights + 2 * WIDTH * DEPTH);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            const factors h = broadcast_factors(before + row * H + k);
            sum[row][0] = multiply_add(sum[row][0], h, r);
            sum[row][1] = multiply_add(sum[row][1], h, z);
            sum[row][2] = multiply_add(sum[row][2], h, s);
        }
    }
    const vec bias_n = load(f->bias + unit);
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) {
        const int64_t position = t * f->B + lane + row;
        const factor *into = f->into + position * 3 * H + unit;
        const vec s = sum[row][2];
        const vec r = sigmoid(sum[row][0] + load_widened(into + H));
        const vec z = sigmoid(sum[row][1] + load_widened(into + 2 * H));
        const vec n = tanh_of(r * s + (bias_n + load_widened(into)));
        const vec h = n + z * (load(f->states + position * H + unit) - n);
        store(f->states + (position + f->B) * H + unit, h);
        store_rounded(f->rounded + (position + f->B) * H + unit, h);
        if (f->nrs) {
            factor *nrs = f->nrs + position * 3 * H + unit;
            store_rounded(nrs, n);
            store_rounded(nrs + H, r);
            store_rounded(nrs + 2 * H, s);
            store(f->z + position * H + unit, z);
        }
    }
}

typedef struct {
    int64_t T, B, H;
    const float *d_out;    /* [T, B, H] */
    const factor *nrs;     /* this and the next two: as in Forward */
    const float *z;
    const float *states;
    const factor *weights; /* [H / UNITS, 3 H / DEPTH, 2, WIDTH, DEPTH] of r, z, s */
    factor *d_gates;       /* [T, B, 4 H] gradients of the sums that n, r, z are functions of, and of s */
    float *d_h;            /* [B, H] gradient carried from step to step; at the end, that of the first state */
} Backward;

/* Write the gradients of the gates' sums of a step, from that of the state after it; return the part of it that goes
   directly to the state before. */
static inline vec gates_backward(const Backward *b, int64_t position, int64_t unit, vec d_h) {
    const int64_t H = b->H;
    const factor *nrs = b->nrs + position * 3 * H + unit;
    const vec n = load_widened(nrs), r = load_widened(nrs + H), s = load_widened(nrs + 2 * H);
    const vec z = load(b->z + position * H + unit), before = load(b->states + position * H + unit);
    const vec kept = d_h * z, new = d_h - kept;
    const vec d_n = new - new * n * n;
    const vec d_s = d_n * r;
    factor *d_gates = b->d_gates + position * 4 * H + unit;
    store_rounded(d_gates, d_n);
    store_rounded(d_gates + H, (d_s - d_s * r) * s);
    store_rounded(d_gates + 2 * H, new * z * (before - n));
    store_rounded(d_gates + 3 * H, d_s);
    return kept;
}

/* Compute, for `rows` lanes and UNITS units, the gradient of the state before step t from those of the gates at t, and
   from it the gradients of the gates at t - 1. */
static inline __attribute__((always_inline)) void step_backward(const Backward *b, int64_t t, int64_t lane,
                                                                int64_t unit, const int rows) {
    const int64_t H = b->H;
    const factor *weights = b->weights + unit * 3 * H;
    const factor *d_gates = b->d_gates + (t * b->B + lane) * 4 * H + H;
    vec sum[ROWS][2];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
        for (int half = 0; half < 2; half++) sum[row][half] = broadcast(0.0f);
    for (int64_t k = 0; k < 3 * H; k += DEPTH, weights += UNITS * DEPTH) {
        const factors left = load_factors(weights), right = load_factors(weights + WIDTH * DEPTH);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            const factors d = broadcast_factors(d_gates + row * 4 * H + k);
            sum[row][0] = multiply_add(sum[row][0], d, left);
            sum[row][1] = multiply_add(sum[row][1], d, right);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
        for (int half = 0; half < 2; half++) {
            const int64_t position = (t - 1) * b->B + lane + row, at = unit + half * WIDTH;
            float *carried = b->d_h + (lane + row) * H + at;
            vec d_h = load(carried) + sum[row][half];
            if (t > 0) d_h = gates_backward(b, position, at, d_h + load(b->d_out + position * H + at));
            store(carried, d_h);
        }
}

#define EACH_TILE(step, first, after, ...)                            \
    for (int64_t lane = first; lane < after; lane += ROWS)            \
        switch (after - lane < ROWS ? after - lane : ROWS) {          \
            case 1: step(__VA_ARGS__, 1); break;                      \
            case 2: step(__VA_ARGS__, 2); break;                      \
            case 3: step(__VA_ARGS__, 3); break;                      \
            case 4: step(__VA_ARGS__, 4); break;                      \
            case 5: step(__VA_ARGS__, ROWS < 5 ? ROWS : 5); break;    \
            case 6: step(__VA_ARGS__, ROWS < 6 ? ROWS : 6); break;    \
            case 7: step(__VA_ARGS__, ROWS < 7 ? ROWS : 7); break;    \
            case 8: step(__VA_ARGS__, ROWS < 8 ? ROWS : 8); break;    \
        }

static void forward_lanes(const Forward *f, int64_t first, int64_t after) {
    for (int64_t offset = first * f->H; offset < after * f->H; offset += WIDTH)
        store_rounded(f->rounded + offset, load(f->states + offset));
    for (int64_t t = 0; t < f->T; t++)
        for (int64_t unit = 0; unit < f->H; unit += WIDTH) EACH_TILE(step_forward, first, after, f, t, lane, unit)
}

static void backward_lanes(const Backward *b, int64_t first, int64_t after) {
    for (int64_t lane = first; lane < after; lane++)
        for (int64_t unit = 0; unit < b->H; unit += WIDTH) {
            const int64_t position = (b->T - 1) * b->B + lane;
            const vec d_h = load(b->d_out + position * b->H + unit);
            store(b->d_h + lane * b->H + unit, gates_backward(b, position, unit, d_h));
        }
    for (int64_t t = b->T - 1; t >= 0; t--)
        for (int64_t unit = 0; unit < b->H; unit += UNITS) EACH_TILE(step_backward, first, after, b, t, lane, unit)
}

const int64_t width = WIDTH, units = UNITS;

void forward(const Forward *f, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
        forward_lanes(f, i * f->B / n, (i + 1) * f->B / n);
    }
}

void backward(const Backward *b, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
        backward_lanes(b, i * b->B / n, (i + 1) * b->B / n);
    }
}
