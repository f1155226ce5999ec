/* Factors of matrix products: bf16 with -DBF16, which needs AVX512-BF16, else fp32. Sums are fp32. */

#include <string.h>

#include "vectors.h"

#ifdef BF16

#include <immintrin.h>

enum { DEPTH = 2 }; /* neighbouring factors of a row that are multiplied at once */
typedef uint16_t factor;
typedef __m512bh factors;

static inline factors broadcast_factors(const factor *row) {
    int32_t both;
    memcpy(&both, row, sizeof both);
    return (factors)_mm512_set1_epi32(both);
}

static inline factors load_factors(const factor *weights) { return (factors)_mm512_loadu_si512(weights); }

static inline vec multiply_add(vec sum, factors row, factors weights) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, row, weights);
}

static inline vec load_widened(const factor *from) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}

static inline void store_rounded(factor *to, vec x) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}

#else

enum { DEPTH = 1 };
typedef float factor;
typedef vec factors;

static inline factors broadcast_factors(const factor *row) { return broadcast(*row); }

static inline factors load_factors(const factor *weights) { return load(weights); }

static inline vec multiply_add(vec sum, factors row, factors weights) { return sum + row * weights; }

static inline vec load_widened(const factor *from) { return load(from); }

static inline void store_rounded(factor *to, vec x) { store(to, x); }

#endif
