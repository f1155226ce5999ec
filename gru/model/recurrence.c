/* The time steps of the GRU, forwards and backwards, on x86-64 processors that multiply bf16 (AVX512-BF16).

   Everything that the steps of a sequence need one after the other, and nothing else: the products of whole sequences
   are torch's. Each thread takes some of the lanes through all of the steps, so threads never wait for each other. A
   tile of rows and the gates of 16 or 32 hidden units is multiplied in registers, and the pointwise work is done there
   before anything is stored. A row's sums are added up in one order, whatever the tile, so a lane's bits depend neither
   on the number of threads nor on the other lanes.

   T time, B lanes, H hidden width, a multiple of UNITS. Equations and order of the gates: recurrence.py. */

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")

enum { WIDTH = 16, UNITS = 2 * WIDTH, ROWS = 8 };

typedef uint16_t bf16;

/* Two neighbouring factors of a row, in all places. */
static inline __m512bh pair(const bf16 *row) {
    int32_t both;
    memcpy(&both, row, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
}

static inline __m512bh factors(const bf16 *weights) { return (__m512bh)_mm512_loadu_si512(weights); }

static inline __m512 widened(const bf16 *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

static inline void store_rounded(bf16 *to, __m512 x) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

/* 2^x: a polynomial of the remainder in [-1/2, 1/2] (Taylor in x ln 2, off by 2e-7 at most), scaled by the rest. */
static inline __m512 power_of_two(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 sum = _mm512_set1_ps(1.5403530e-4f);
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(1.3333558e-3f));
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(9.6181291e-3f));
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(5.5504109e-2f));
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(2.4022651e-1f));
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(6.9314718e-1f));
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, whole);
}

static inline __m512 one_over_one_plus_power(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, power_of_two(x)));
}

static inline __m512 sigmoid(__m512 x) {
    return one_over_one_plus_power(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
}

/* 2 sigmoid(2 x) - 1 */
static inline __m512 tanh_of(__m512 x) {
    const __m512 half = one_over_one_plus_power(_mm512_mul_ps(x, _mm512_set1_ps(-2.88539008f)));
    return _mm512_fmsub_ps(_mm512_set1_ps(2.0f), half, _mm512_set1_ps(1.0f));
}

typedef struct {
    int64_t T, B, H;
    const bf16 *into;      /* [T, B, 3 H] products of the inputs: n, r, z */
    const float *bias;     /* [4 H] n, r, z, s */
    const bf16 *weights;   /* [H / WIDTH, H / 2, 3, WIDTH, 2] of r, z, s */
    bf16 *nrs;             /* [T, B, 3 H] gates for backward: n, r, s; NULL where they are not wanted */
    float *z;              /* [T, B, H] and z: what is nearly 1, rounded to bf16, would keep nothing or all */
    float *states;         /* [T + 1, B, H], the first of them given */
    bf16 *rounded;         /* [T + 1, B, H] of the states */
} Forward;

/* The states of `rows` lanes from `lane` on and of WIDTH units from `unit` on, after step t. */
static inline __attribute__((always_inline)) void advance(const Forward *f, int64_t t, int64_t lane, int64_t unit,
                                                          const int rows) {
    const int64_t H = f->H;
    const bf16 *weights = f->weights + unit / WIDTH * (H / 2) * 3 * UNITS;
    const bf16 *before = f->rounded + (t * f->B + lane) * H;
    __m512 sum[ROWS][3];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
        for (int gate = 0; gate < 3; gate++) sum[row][gate] = _mm512_loadu_ps(f->bias + (gate + 1) * H + unit);
    for (int64_t k = 0; k < H; k += 2, weights += 3 * UNITS) {
        const __m512bh r = factors(weights), z = factors(weights + UNITS), s = factors(weights + 2 * UNITS);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            const __m512bh h = pair(before + row * H + k);
            sum[row][0] = _mm512_dpbf16_ps(sum[row][0], h, r);
            sum[row][1] = _mm512_dpbf16_ps(sum[row][1], h, z);
            sum[row][2] = _mm512_dpbf16_ps(sum[row][2], h, s);
        }
    }
    const __m512 bias_n = _mm512_loadu_ps(f->bias + unit);
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) {
        const int64_t place = t * f->B + lane + row;
        const bf16 *into = f->into + place * 3 * H + unit;
        const __m512 s = sum[row][2];
        const __m512 r = sigmoid(_mm512_add_ps(sum[row][0], widened(into + H)));
        const __m512 z = sigmoid(_mm512_add_ps(sum[row][1], widened(into + 2 * H)));
        const __m512 n = tanh_of(_mm512_fmadd_ps(r, s, _mm512_add_ps(bias_n, widened(into))));
        const __m512 h_before = _mm512_loadu_ps(f->states + place * H + unit);
        const __m512 h = _mm512_fmadd_ps(z, _mm512_sub_ps(h_before, n), n);
        _mm512_storeu_ps(f->states + (place + f->B) * H + unit, h);
        store_rounded(f->rounded + (place + f->B) * H + unit, h);
        if (f->nrs) {
            bf16 *nrs = f->nrs + place * 3 * H + unit;
            store_rounded(nrs, n);
            store_rounded(nrs + H, r);
            store_rounded(nrs + 2 * H, s);
            _mm512_storeu_ps(f->z + place * H + unit, z);
        }
    }
}

typedef struct {
    int64_t T, B, H;
    const float *d_out;    /* [T, B, H] */
    const bf16 *nrs;       /* these three as Forward's */
    const float *z;
    const float *states;
    const bf16 *weights;   /* [H / UNITS, 3 H / 2, 2, WIDTH, 2] of r, z, s */
    bf16 *d_gates;         /* [T, B, 4 H] gradients of the sums that n, r, z are functions of, and of s */
    float *d_h;            /* [B, H]: what is carried; at the end, the gradient of the first state */
} Backward;

/* From the gradient of the state after step t to those of the gates' sums at t, and what goes straight to the state
   before. */
static inline __m512 unfold(const Backward *b, int64_t place, int64_t unit, __m512 d_h) {
    const int64_t H = b->H;
    const bf16 *nrs = b->nrs + place * 3 * H + unit;
    const __m512 n = widened(nrs), r = widened(nrs + H), s = widened(nrs + 2 * H);
    const __m512 z = _mm512_loadu_ps(b->z + place * H + unit);
    const __m512 before = _mm512_loadu_ps(b->states + place * H + unit);
    const __m512 kept = _mm512_mul_ps(d_h, z), new = _mm512_sub_ps(d_h, kept);
    const __m512 d_n = _mm512_fnmadd_ps(_mm512_mul_ps(new, n), n, new);
    const __m512 d_s = _mm512_mul_ps(d_n, r);
    const __m512 d_r = _mm512_mul_ps(_mm512_fnmadd_ps(d_s, r, d_s), s);
    const __m512 d_z = _mm512_mul_ps(_mm512_mul_ps(new, z), _mm512_sub_ps(before, n));
    bf16 *d_gates = b->d_gates + place * 4 * H + unit;
    store_rounded(d_gates, d_n);
    store_rounded(d_gates + H, d_r);
    store_rounded(d_gates + 2 * H, d_z);
    store_rounded(d_gates + 3 * H, d_s);
    return kept;
}

/* Of `rows` lanes and UNITS units: the gradient of the state before step t from those of the gates at t, and with it
   the gates at t - 1. */
static inline __attribute__((always_inline)) void retreat(const Backward *b, int64_t t, int64_t lane, int64_t unit,
                                                          const int rows) {
    const int64_t H = b->H;
    const bf16 *weights = b->weights + unit / UNITS * (3 * H / 2) * 2 * UNITS;
    const bf16 *d_gates = b->d_gates + (t * b->B + lane) * 4 * H + H;
    __m512 sum[ROWS][2];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
        for (int half = 0; half < 2; half++) sum[row][half] = _mm512_setzero_ps();
    for (int64_t k = 0; k < 3 * H; k += 2, weights += 2 * UNITS) {
        const __m512bh left = factors(weights), right = factors(weights + UNITS);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            const __m512bh d = pair(d_gates + row * 4 * H + k);
            sum[row][0] = _mm512_dpbf16_ps(sum[row][0], d, left);
            sum[row][1] = _mm512_dpbf16_ps(sum[row][1], d, right);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
        for (int half = 0; half < 2; half++) {
            const int64_t place = (t - 1) * b->B + lane + row, at = unit + half * WIDTH;
            float *carried = b->d_h + (lane + row) * H + at;
            __m512 d_h = _mm512_add_ps(_mm512_loadu_ps(carried), sum[row][half]);
            if (t > 0) {
                d_h = _mm512_add_ps(d_h, _mm512_loadu_ps(b->d_out + place * H + at));
                d_h = unfold(b, place, at, d_h);
            }
            _mm512_storeu_ps(carried, d_h);
        }
}

#define EACH_TILE(step, first, after, ...)                            \
    for (int64_t lane = first; lane < after; lane += ROWS)            \
        switch (after - lane < ROWS ? after - lane : ROWS) {          \
            case 1: step(__VA_ARGS__, 1); break;                      \
            case 2: step(__VA_ARGS__, 2); break;                      \
            case 3: step(__VA_ARGS__, 3); break;                      \
            case 4: step(__VA_ARGS__, 4); break;                      \
            case 5: step(__VA_ARGS__, 5); break;                      \
            case 6: step(__VA_ARGS__, 6); break;                      \
            case 7: step(__VA_ARGS__, 7); break;                      \
            default: step(__VA_ARGS__, 8);                            \
        }

static void forward_lanes(const Forward *f, int64_t first, int64_t after) {
    for (int64_t place = first * f->H; place < after * f->H; place += WIDTH)
        store_rounded(f->rounded + place, _mm512_loadu_ps(f->states + place));
    for (int64_t t = 0; t < f->T; t++)
        for (int64_t unit = 0; unit < f->H; unit += WIDTH) EACH_TILE(advance, first, after, f, t, lane, unit)
}

static void backward_lanes(const Backward *b, int64_t first, int64_t after) {
    for (int64_t lane = first; lane < after; lane++)
        for (int64_t unit = 0; unit < b->H; unit += WIDTH) {
            const int64_t place = (b->T - 1) * b->B + lane;
            const __m512 d_h = _mm512_loadu_ps(b->d_out + place * b->H + unit);
            _mm512_storeu_ps(b->d_h + lane * b->H + unit, unfold(b, place, unit, d_h));
        }
    for (int64_t t = b->T - 1; t >= 0; t--)
        for (int64_t unit = 0; unit < b->H; unit += UNITS) EACH_TILE(retreat, first, after, b, t, lane, unit)
}

#pragma GCC pop_options

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
