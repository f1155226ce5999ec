/* draw_numpy of sampling.py: the same noise, but logarithms are computed only for tokens that can still win.

   native.py compiles this file for the machine that it runs on. */

#include <math.h>
#include <stdint.h>

static const uint64_t GOLDEN = 0x9E3779B97F4A7C15;

static inline uint64_t mix(uint64_t state) { /* splitmix64 */
    uint64_t word = state + GOLDEN;
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB;
    return word ^ (word >> 31);
}

static int64_t draw_row(int64_t V, const float *logits, double temperature, uint64_t key) {
    const double log_2 = 0.6931471805599453;
    double best = -INFINITY;
    int64_t token = 0;
    uint64_t word = 0;
    for (int64_t v = 0; v < V; v++) {
        word = v % 2 ? word >> 32 : mix(key + v / 2 * GOLDEN);
        const uint32_t bits = (uint32_t)word; /* u = (bits + 1/2) / 2^32 */
        const double score = logits[v] / temperature;
        /* The noise -log(-log u) is at most -log(1 - u), and 1 - u at least a power of two. */
        const uint64_t complement = 2 * (uint64_t)(uint32_t)~bits + 1;
        if (score + (__builtin_clzll(complement) - 30) * log_2 <= best) continue;
        const double noisy = score - log(-log((bits + 0.5) * 0x1p-32));
        if (noisy > best) best = noisy, token = v;
    }
    return token;
}

/* Draw one token for each of the rows, which are `stride` floats apart. */
void draw(int64_t rows, int64_t V, int64_t stride, const float *logits, const double *temperatures,
          const uint64_t *seeds, const uint64_t *positions, int64_t *tokens) {
    for (int64_t row = 0; row < rows; row++)
        tokens[row] = draw_row(V, logits + row * stride, temperatures[row], mix(mix(seeds[row]) + positions[row]));
}
