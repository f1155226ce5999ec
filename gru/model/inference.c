/* The language model for inference: states and tokens in, states and logits out, no gradients.

   Weights of matrix products are bf16, two of them in 32 bits, because the cost of a step is that of reading them;
   all else is fp32, the sums too. A row's sums are added in one order, whatever rows are beside it, so its bits depend
   neither on other rows nor on their number.

   native.py compiles it for the machine it runs on. N rows; T time steps, S streams, E embedding width, H hidden width,
   V vocabulary; E and H are multiples of UNITS. Equations: gru_layer.py, language_model.py. */

#include <math.h>
#include <string.h>

#include "vectors.h"

#if defined(__AVX512F__)
enum { ROWS = 12 }; /* rows in a tile, whose sums nearly fill the registers */
#elif defined(__aarch64__)
enum { ROWS = 12 };
#else
enum { ROWS = 6 };
#endif

typedef struct {
    int64_t in, out;        /* out: rounded up to a multiple of UNITS; the width of a row of results */
    const int32_t *weights; /* [out / UNITS, in, WIDTH]: low half unit i of a block, high half unit i + WIDTH */
    const float *bias;      /* [out], or NULL */
} Linear;

typedef struct {
    const float *norm;             /* [E] */
    Linear from_x, from_h, project; /* gates r, z, n, as in torch.nn.GRU; project.in is 0 without projection */
} Layer;

typedef struct {
    int64_t L, E, H;
    const float *embedding; /* [V, E] */
    const Layer *layers;
    const float *norm; /* [E] */
    Linear output;
} Model;

/* Multiply `rows` rows by `blocks` blocks of UNITS units. */
static inline __attribute__((always_inline)) void tile(const Linear *linear, int64_t unit, const float *x, float *y,
                                                       const int rows, const int blocks) {
    const int32_t *weights = linear->weights + unit / 2 * linear->in;
    vec sum[ROWS][4];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int half = 0; half < 2 * blocks; half++)
            sum[row][half] = linear->bias ? load(linear->bias + unit + half * WIDTH) : broadcast(0.0f);
    for (int64_t k = 0; k < linear->in; k++) {
#pragma GCC unroll 2
        for (int block = 0; block < blocks; block++) {
            const ints both = *(const ints *)(weights + (block * linear->in + k) * WIDTH);
            const vec low = (vec)(both << 16), high = (vec)(both & (int32_t)0xffff0000);
#pragma GCC unroll 12
            for (int row = 0; row < rows; row++) {
                const vec factor = broadcast(x[row * linear->in + k]);
                sum[row][2 * block] += factor * low;
                sum[row][2 * block + 1] += factor * high;
            }
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int half = 0; half < 2 * blocks; half++) store(y + row * linear->out + unit + half * WIDTH, sum[row][half]);
}

#define CASE(rows) \
    case rows: tile(linear, unit, x + row * linear->in, y + row * linear->out, rows < ROWS ? rows : ROWS, 1); break;

/* y [N, out] = x [N, in] times the weights, plus the bias. */
static void multiply(const Linear *linear, int64_t N, const float *x, float *y) {
    int64_t unit = 0;
    if (N == 1) /* the sums of one row are too few to keep the processor busy */
        for (; unit + 2 * UNITS <= linear->out; unit += 2 * UNITS) tile(linear, unit, x, y, 1, 2);
    for (; unit < linear->out; unit += UNITS)
        for (int64_t row = 0; row < N; row += ROWS) switch (N - row < ROWS ? N - row : ROWS) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
            }
}

static float sum_of(vec x) {
    float sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += x[i];
    return sum;
}

/* LayerNorm without bias, with torch's epsilon. */
static void normalize(int64_t N, int64_t E, const float *x, const float *scale, float *y) {
    for (const float *after = x + N * E; x < after; x += E, y += E) {
        vec sum = broadcast(0.0f), squares = broadcast(0.0f);
        for (int64_t i = 0; i < E; i += WIDTH) sum += load(x + i);
        const float mean = sum_of(sum) / E;
        for (int64_t i = 0; i < E; i += WIDTH) {
            const vec from_mean = load(x + i) - mean;
            squares += from_mean * from_mean;
        }
        const float factor = 1.0f / sqrtf(sum_of(squares) / E + 1e-5f);
        for (int64_t i = 0; i < E; i += WIDTH) store(y + i, (load(x + i) - mean) * factor * load(scale + i));
    }
}

/* Compute the state [S, H] after a step, from the matrix products of the input and of the state before. */
static void step(int64_t S, int64_t H, int64_t out, const float *from_x, const float *from_h, float *state) {
    for (int64_t lane = 0; lane < S; lane++, from_x += out, from_h += out, state += H)
        for (int64_t i = 0; i < H; i += WIDTH) {
            const vec r = sigmoid(load(from_x + i) + load(from_h + i));
            const vec z = sigmoid(load(from_x + H + i) + load(from_h + H + i));
            const vec n = tanh_of(load(from_x + 2 * H + i) + r * load(from_h + 2 * H + i));
            store(state + i, n + z * (load(state + i) - n));
        }
}

/* Compute the input of the output layer, x [T, S, E], and the states [L, S, H] after `tokens` [T, S], in place.

   scratch: N (E + H + from_x.out) + S from_h.out floats, where N = T S. */
void features(const Model *m, int64_t T, int64_t S, const int64_t *tokens, float *states, float *x, float *scratch) {
    const int64_t N = T * S, E = m->E, H = m->H;
    float *inner = scratch, *outs = inner + N * E, *from_x = outs + N * H;
    for (int64_t row = 0; row < N; row++) memcpy(x + row * E, m->embedding + tokens[row] * E, E * sizeof *x);
    for (int64_t layer = 0; layer < m->L; layer++, states += S * H) {
        const Layer *l = m->layers + layer;
        float *from_h = from_x + N * l->from_x.out;
        normalize(N, E, x, l->norm, inner);
        multiply(&l->from_x, N, inner, from_x);
        for (int64_t t = 0; t < T; t++) {
            multiply(&l->from_h, S, states, from_h);
            step(S, H, l->from_x.out, from_x + t * S * l->from_x.out, from_h, states);
            memcpy(outs + t * S * H, states, S * H * sizeof *states);
        }
        if (l->project.in) multiply(&l->project, N, outs, inner);
        const float *added = l->project.in ? inner : outs;
        for (int64_t i = 0; i < N * E; i += WIDTH) store(x + i, load(x + i) + load(added + i));
    }
    normalize(N, E, x, m->norm, x);
}

/* Compute the logits y [N, output.out] of x [N, E]. */
void logits(const Model *m, int64_t N, const float *x, float *y) { multiply(&m->output, N, x, y); }

const int64_t width = WIDTH, units = UNITS;
