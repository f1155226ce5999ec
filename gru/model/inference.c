/* The language model for inference: states and tokens in, states and logits out, no gradients.

   Weights of matrix products are bf16, because the cost of a step with few rows is that of reading them. With -DBF16,
   what they are multiplied with is rounded to bf16, too. With -DINT8 both are whole numbers in [-127, 127], times a
   scale: one for each unit of the weights, and one for each row of factors, which lies behind it. Gates and states are
   fp32. A row's sums are added in one order, whatever rows are beside it, and each of them by one thread. So its bits
   depend neither on other rows, nor on their number, nor on the number of threads.

   native.py compiles it for the machine it runs on. N rows; T time steps, S streams, E embedding width, H hidden width,
   V vocabulary; E and H are multiples of UNITS. Equations: gru_layer.py, language_model.py. */

#include <math.h>
#include <omp.h>

#include "factors.h"

/* Rows in a tile, whose sums nearly fill the registers. */
#if defined(BF16) || defined(INT8)
enum { ROWS = 8 };
#elif defined(__AVX512F__) || defined(__aarch64__)
enum { ROWS = 12 };
#else
enum { ROWS = 6 };
#endif

/* PACKED: weights in 32 bits. SCALE: factors that the scale behind a row takes the place of. STATE_UNIT: factor of a
   state of 1, the largest. */
#ifdef INT8
enum { PACKED = 4, SCALE = sizeof(float), STATE_UNIT = 127 };
#else
enum { PACKED = 2, SCALE = 0, STATE_UNIT = 1 };
#endif

typedef struct {
    int64_t in, out;        /* out: rounded up to a multiple of UNITS; the width of a row of results */
    const int32_t *weights; /* [out / UNITS, in, UNITS / PACKED], see Pair */
    const float *bias;      /* [out], or NULL */
    const float *scale;     /* [out] for int8: that of the weights */
    const int32_t *offset;  /* [out] for int8: -128 times the sum of the weights, since factors are 128 too large */
} Linear;

typedef struct {
    const float *norm;              /* [E] */
    Linear from_x, from_h, project; /* gates r, z, n, as in torch.nn.GRU; project.in is 0 without projection */
} Layer;

typedef struct {
    int64_t L, E, H, threads;
    const float *embedding;  /* [V, E] */
    const float *from_token; /* [V, from_x.out] results of the first layer's from_x for each token, or NULL */
    const Layer *layers;
    const float *norm; /* [E] */
    Linear output;
} Model;

/* Weights of UNITS units for DEPTH inputs, in two vectors. 32 bits have four int8 or two bf16 of neighbouring inputs of
   one unit; or, where factors are fp32, a pair of bf16 is that of units i (low half) and i + WIDTH (high half). */
typedef struct {
    factors left, right;
} Pair;

static inline Pair load_pair(const int32_t *weights) {
#if defined(INT8) || defined(BF16)
    return (Pair){load_factors((const void *)weights), load_factors((const void *)(weights + WIDTH))};
#else
    const ints both = *(const ints *)weights;
    return (Pair){(vec)(both << 16), (vec)(both & (int32_t)0xffff0000)};
#endif
}

static inline vec bias_of(const Linear *linear, int64_t unit) {
    return linear->bias ? load(linear->bias + unit) : broadcast(0.0f);
}

/* The sums of WIDTH units before the first product. */
static inline sums first_sums(const Linear *linear, int64_t unit) {
#ifdef INT8
    return *(const ints *)(linear->offset + unit);
#else
    return bias_of(linear, unit);
#endif
}

/* The results of WIDTH units from their sums over a row of factors. */
static inline vec result(const Linear *linear, int64_t unit, const factor *row, sums sum) {
#ifdef INT8
    float scale;
    memcpy(&scale, row + linear->in, SCALE);
    return __builtin_convertvector(sum, vec) * (load(linear->scale + unit) * scale) + bias_of(linear, unit);
#else
    return sum;
#endif
}

static inline int64_t row_size(int64_t in) { return in + SCALE; }

/* Multiply `rows` rows by `blocks` blocks of UNITS units. */
static inline __attribute__((always_inline)) void tile(const Linear *linear, int64_t unit, const factor *x, float *y,
                                                       const int rows, const int blocks) {
    const int32_t *weights = linear->weights + unit / PACKED * linear->in;
    const int64_t size = row_size(linear->in);
    sums sum[ROWS][8];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int half = 0; half < 2 * blocks; half++) sum[row][half] = first_sums(linear, unit + half * WIDTH);
    for (int64_t k = 0; k < linear->in; k += DEPTH) {
#pragma GCC unroll 4
        for (int block = 0; block < blocks; block++) {
            const Pair pair = load_pair(weights + (block * linear->in + k) * (UNITS / PACKED));
#pragma GCC unroll 12
            for (int row = 0; row < rows; row++) {
                const factors inputs = broadcast_factors(x + row * size + k);
                sum[row][2 * block] = multiply_add(sum[row][2 * block], inputs, pair.left);
                sum[row][2 * block + 1] = multiply_add(sum[row][2 * block + 1], inputs, pair.right);
            }
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int half = 0; half < 2 * blocks; half++)
            store(y + row * linear->out + unit + half * WIDTH,
                  result(linear, unit + half * WIDTH, x + row * size, sum[row][half]));
}

/* The part of a thread in [0, all): whole multiples of `multiple`. */
typedef struct {
    int64_t first, after;
} Part;

static Part part(int64_t all, int64_t multiple) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads(), parts = all / multiple;
    return (Part){thread * parts / threads * multiple, (thread + 1) * parts / threads * multiple};
}

#define CASE(rows) \
    case rows: tile(linear, unit, x + row * size, y + row * linear->out, rows < ROWS ? rows : ROWS, 1); break;

/* y [N, out] = x [N, in] times the weights, plus the bias, for some of the units. */
static void multiply(const Linear *linear, int64_t N, const factor *x, float *y, Part units) {
    const int64_t size = row_size(linear->in);
    int64_t unit = units.first;
    if (N == 1) /* the sums of one row are too few to keep the processor busy */
        for (; unit + 4 * UNITS <= units.after; unit += 4 * UNITS) tile(linear, unit, x, y, 1, 4);
    for (; unit < units.after; unit += UNITS)
        for (int64_t row = 0; row < N; row += ROWS) switch (N - row < ROWS ? N - row : ROWS) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
            }
}

static float sum_of(vec x) {
    float sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += x[i];
    return sum;
}

/* The larger of `size` and |x|, element by element. */
static inline vec larger_size(vec size, vec x) {
    const ints other = (ints)x & INT32_MAX, above = (vec)other > size;
    return (vec)(((ints)size & ~above) | (other & above));
}

static inline float largest_of(vec x) {
    float largest = x[0];
    for (int i = 1; i < WIDTH; i++) largest = fmaxf(largest, x[i]);
    return largest;
}

/* Set the scale of a row of factors. */
static void set_scale(factor *row, int64_t in, float scale) { memcpy(row + in, &scale, SCALE); }

/* LayerNorm of a row, without bias, with torch's epsilon. */
static void normalize(int64_t E, const float *x, const float *weight, factor *y) {
    vec sum = broadcast(0.0f), squares = broadcast(0.0f);
    for (int64_t i = 0; i < E; i += WIDTH) sum += load(x + i);
    const float mean = sum_of(sum) / E;
    for (int64_t i = 0; i < E; i += WIDTH) {
        const vec from_mean = load(x + i) - mean;
        squares += from_mean * from_mean;
    }
    float per_deviation = 1.0f / sqrtf(sum_of(squares) / E + 1e-5f);
#ifdef INT8
    vec sizes = broadcast(0.0f);
    for (int64_t i = 0; i < E; i += WIDTH) sizes = larger_size(sizes, (load(x + i) - mean) * load(weight + i));
    const float largest = largest_of(sizes);
    set_scale(y, E, largest * per_deviation / 127);
    per_deviation = largest > 0 ? 127 / largest : 0;
#endif
    for (int64_t i = 0; i < E; i += WIDTH)
        store_rounded(y + i, (load(x + i) - mean) * per_deviation * load(weight + i));
}

/* Compute the products y [N, out] for the gates of some of the H units. */
static void multiply_gates(const Linear *linear, int64_t N, int64_t H, const factor *x, float *y, Part units) {
    if (units.after - units.first == H) return multiply(linear, N, x, y, (Part){0, linear->out});
    for (int64_t gate = 0; gate < 3 * H; gate += H)
        multiply(linear, N, x, y, (Part){gate + units.first, gate + units.after});
}

/* Compute some of the units of a stream's state [H] after a step, from the products of the input and of the state
   before. rounded: [H] the state as factors. residual: [H] what the state is added to, or NULL. */
static void step(int64_t H, const float *from_x, const float *from_h, float *state, factor *rounded, float *residual,
                 Part units) {
    for (int64_t i = units.first; i < units.after; i += WIDTH) {
        const vec r = sigmoid(load(from_x + i) + load(from_h + i));
        const vec z = sigmoid(load(from_x + H + i) + load(from_h + H + i));
        const vec n = tanh_of(load(from_x + 2 * H + i) + r * load(from_h + 2 * H + i));
        const vec h = n + z * (load(state + i) - n);
        store(state + i, h);
        store_rounded(rounded + i, h * STATE_UNIT);
        if (residual) store(residual + i, load(residual + i) + h);
    }
}

/* Where the threads of `features` keep what they compute. */
typedef struct {
    float *x;         /* [N, E] embeddings, to which each layer adds */
    float *from_x;    /* [N, out] */
    float *from_h;    /* [S, out] */
    float *projected; /* [N, E] */
    factor *inner;    /* [N, row_size(E)] */
    factor *outs;     /* [T + 1, S, row_size(H)] states of a layer, of which the first are those before */
} Scratch;

/* A thread's part of one layer, whose states are `state` [S, H]. from_token: for the first layer, see Model. */
static void advance(const Model *m, const Layer *l, int64_t T, int64_t S, const int64_t *tokens,
                    const float *from_token, float *state, const Scratch *scratch) {
    const int64_t N = T * S, E = m->E, H = m->H, out = l->from_x.out, size = row_size(H);
    const Part rows = part(N, 1), streams = part(S, 1), units = part(H, UNITS), embedded = part(E, UNITS);
    for (int64_t row = rows.first; row < rows.after && !from_token; row++)
        normalize(E, scratch->x + row * E, l->norm, scratch->inner + row * row_size(E));
    for (int64_t stream = streams.first; stream < streams.after; stream++) {
        for (int64_t t = 0; t <= T; t++) set_scale(scratch->outs + (t * S + stream) * size, H, 1.0f / STATE_UNIT);
        for (int64_t i = 0; i < H; i += WIDTH)
            store_rounded(scratch->outs + stream * size + i, load(state + stream * H + i) * STATE_UNIT);
    }
#pragma omp barrier
    if (!from_token) multiply_gates(&l->from_x, N, H, scratch->inner, scratch->from_x, units);
    for (int64_t t = 0; t < T; t++) {
        factor *before = scratch->outs + t * S * size;
        multiply_gates(&l->from_h, S, H, before, scratch->from_h, units);
        for (int64_t stream = 0; stream < S; stream++) {
            const int64_t row = t * S + stream;
            const float *from_x = from_token ? from_token + tokens[row] * out : scratch->from_x + row * out;
            float *residual = l->project.in ? NULL : scratch->x + row * E;
            step(H, from_x, scratch->from_h + stream * out, state + stream * H, before + (S + stream) * size,
                 residual, units);
        }
#pragma omp barrier
    }
    if (!l->project.in) return;
    multiply(&l->project, N, scratch->outs + S * size, scratch->projected, embedded);
    for (int64_t row = 0; row < N; row++)
        for (int64_t i = row * E + embedded.first; i < row * E + embedded.after; i += WIDTH)
            store(scratch->x + i, load(scratch->x + i) + load(scratch->projected + i));
#pragma omp barrier
}

/* Compute the input of the output layer, y [T, S, row_size(E)], and the states after `tokens` [T, S], in place. The
   states of a layer are [S, H], those of the next one `stride` floats further.

   memory: N (2 E + out) + S out floats and N row_size(E) + (T + 1) S row_size(H) factors, where N = T S and out =
   from_x.out. */
void features(const Model *m, int64_t T, int64_t S, const int64_t *tokens, float *states, int64_t stride, factor *y,
              float *memory) {
    const int64_t N = T * S, E = m->E, out = m->layers->from_x.out;
    Scratch scratch = {.x = memory};
    scratch.from_x = scratch.x + N * E;
    scratch.from_h = scratch.from_x + N * out;
    scratch.projected = scratch.from_h + S * out;
    scratch.inner = (factor *)(scratch.projected + N * E);
    scratch.outs = scratch.inner + N * row_size(E);
#pragma omp parallel num_threads(m->threads)
    {
        const Part rows = part(N, 1);
        for (int64_t row = rows.first; row < rows.after; row++)
            memcpy(scratch.x + row * E, m->embedding + tokens[row] * E, E * sizeof(float));
        for (int64_t layer = 0; layer < m->L; layer++)
            advance(m, m->layers + layer, T, S, tokens, layer ? NULL : m->from_token, states + layer * stride,
                    &scratch);
        for (int64_t row = rows.first; row < rows.after; row++)
            normalize(E, scratch.x + row * E, m->norm, y + row * row_size(E));
    }
}

/* Compute the logits y [N, output.out] of x [N, row_size(E)]. */
void logits(const Model *m, int64_t N, const factor *x, float *y) {
#pragma omp parallel num_threads(m->threads)
    multiply(&m->output, N, x, y, part(m->output.out, UNITS));
}

/* Compute the logits y [S, output.out] after a token in each of the streams. x: [S, row_size(E)]; the rest: as in
   `features`. */
void read_tokens(const Model *m, int64_t S, const int64_t *tokens, float *states, int64_t stride, factor *x,
                 float *memory, float *y) {
    features(m, 1, S, tokens, states, stride, x, memory);
    logits(m, S, x, y);
}

/* Compute what from_token points at, y [V, from_x.out]. inner: [V, row_size(E)] */
void from_tokens(const Model *m, int64_t V, factor *inner, float *y) {
    for (int64_t token = 0; token < V; token++)
        normalize(m->E, m->embedding + token * m->E, m->layers->norm, inner + token * row_size(m->E));
    multiply(&m->layers->from_x, V, inner, y, (Part){0, m->layers->from_x.out});
}

const int64_t units = UNITS, depth = DEPTH, scale = SCALE;
