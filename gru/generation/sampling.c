/* draw_numpy of sampling.py: the same noise, but logarithms are computed only for tokens that can still win.

   native.py compiles this file for the machine that it runs on. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 32 }; /* tokens whose scores are bounded at once; even */

static const uint64_t GOLDEN = 0x9E3779B97F4A7C15;

static inline uint64_t mix(uint64_t state) { /* splitmix64 */
    uint64_t word = state + GOLDEN;
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB;
    return word ^ (word >> 31);
}

/* The uniform noise of tokens v to v + BLOCK - 1; u = (bits + 1/2) / 2^32. */
static inline void uniform_bits(uint64_t key, int64_t v, uint32_t bits[BLOCK]) {
    uint64_t words[BLOCK / 2]; /* each is that of two tokens */
    for (int i = 0; i < BLOCK / 2; i++) words[i] = mix(key + (v / 2 + i) * GOLDEN);
    memcpy(bits, words, sizeof words); /* in the order in which numpy views words as halves */
}

/* Return whether the token at any of `count` logits may score above `best`: bounds in fp32, which vectors compute. */
static inline int any_may_win(int count, const float *logits, float per_temperature, const uint32_t *bits,
                              double best) {
    /* The slack of 1e-3 and of 1e-6 of the scores is more than fp32 can be wrong by. */
    const float threshold = (float)(best - 1e-3 - 1e-6 * fabs(best));
    int any = 0;
    for (int i = 0; i < count; i++) {
        const float score = logits[i] * per_temperature;
        /* The noise -log(-log u) is at most -log(1 - u). The bits of a float, as a whole number, are a piecewise linear
           function of its value that is nowhere above its logarithm. */
        const float complement = (float)(int32_t)(~bits[i] >> 1); /* at most 2^31 (1 - u) */
        int32_t logarithm;
        memcpy(&logarithm, &complement, sizeof logarithm);
        const float noise = 0.69314718f * (31 + 127 - logarithm * 0x1p-23f);
        any |= score + fabsf(score) * 1e-6f + noise > threshold;
    }
    return any;
}

static int64_t draw_row(int64_t V, const float *logits, double temperature, uint64_t key) {
    const float per_temperature = (float)(1 / temperature);
    double best = -INFINITY;
    int64_t token = 0;
    uint32_t bits[BLOCK];
    for (int64_t block = 0; block < V; block += BLOCK) {
        const int64_t after = block + BLOCK < V ? block + BLOCK : V;
        uniform_bits(key, block, bits);
        const int any = after - block == BLOCK /* a constant, for which the compiler uses vectors */
                            ? any_may_win(BLOCK, logits + block, per_temperature, bits, best)
                            : any_may_win(after - block, logits + block, per_temperature, bits, best);
        if (!any) continue;
        for (int64_t v = block; v < after; v++) {
            const double score = logits[v] / temperature;
            if (!any_may_win(1, logits + v, per_temperature, bits + v - block, best)) continue;
            const double noisy = score - log(-log((bits[v - block] + 0.5) * 0x1p-32));
            if (noisy > best) best = noisy, token = v;
        }
    }
    return token;
}

/* Draw one token for each of the rows, which are `stride` floats apart. */
void draw(int64_t rows, int64_t V, int64_t stride, const float *logits, const double *temperatures,
          const uint64_t *seeds, const uint64_t *positions, int64_t *tokens) {
    for (int64_t row = 0; row < rows; row++)
        tokens[row] = draw_row(V, logits + row * stride, temperatures[row], mix(mix(seeds[row]) + positions[row]));
}
