/* Factors of matrix products, and sums of products: int8 and int32 with -DINT8, which needs AVX512-VNNI; bf16 and fp32
   with -DBF16, which needs AVX512-BF16; else fp32 both. */

#include <string.h>

#include "vectors.h"

#if defined(INT8)

#include <immintrin.h>

enum { DEPTH = 4 };     /* neighbouring factors of a row that are multiplied at once */
typedef uint8_t factor; /* 128 more than the number, since the instruction multiplies unsigned by signed ones */
typedef __m512i factors;
typedef ints sums;

static inline factors broadcast_factors(const factor *row) {
    int32_t four;
    memcpy(&four, row, sizeof four);
    return _mm512_set1_epi32(four);
}

static inline factors load_factors(const int8_t *weights) { return _mm512_loadu_si512(weights); }

static inline sums multiply_add(sums sum, factors row, factors weights) {
    return (sums)_mm512_dpbusd_epi32((__m512i)sum, row, weights);
}

static inline void store_rounded(factor *to, vec x) { /* x in [-127.5, 127.5] */
    const __m512i whole = _mm512_cvtps_epi32((__m512)x);
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(128))));
}

#elif defined(BF16)

#include <immintrin.h>

enum { DEPTH = 2 };
typedef uint16_t factor;
typedef __m512bh factors;
typedef vec sums;

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
typedef vec sums;

static inline factors broadcast_factors(const factor *row) { return broadcast(*row); }

static inline factors load_factors(const factor *weights) { return load(weights); }

static inline vec multiply_add(vec sum, factors row, factors weights) { return sum + row * weights; }

static inline vec load_widened(const factor *from) { return load(from); }

static inline void store_rounded(factor *to, vec x) { store(to, x); }

#endif
