/* Vectors of floats as wide as the machine's registers, and the functions of the gates on them. */

#include <stdint.h>

#if defined(__AVX512F__)
enum { WIDTH = 16 }; /* floats in a register */
#elif defined(__AVX__)
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
#endif
enum { UNITS = 2 * WIDTH };

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

static inline vec load(const float *from) { return *(const vec *)from; }

static inline void store(float *to, vec x) { *(vec *)to = x; }

static inline vec broadcast(float x) { return x - (vec){0}; }

static inline vec clamp(vec x, float low, float high) { /* NaN stays NaN */
    const ints below = x < low, above = x > high;
    return (vec)(((ints)x & ~(below | above)) | ((ints)broadcast(low) & below) | ((ints)broadcast(high) & above));
}

/* 2^x, with x clamped to [-126, 126]: a polynomial of the remainder in [-1/2, 1/2] (Taylor series in x ln 2, with an
   error of at most 2e-7), times a power of two built from its exponent. */
static inline vec power_of_two(vec x) {
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    x = clamp(x, -126.0f, 126.0f);
    const vec whole = (x + round) - round;
    const vec f = x - whole;
    vec sum = f * 1.5403530e-4f + 1.3333558e-3f;
    sum = sum * f + 9.6181291e-3f;
    sum = sum * f + 5.5504109e-2f;
    sum = sum * f + 2.4022651e-1f;
    sum = sum * f + 6.9314718e-1f;
    sum = sum * f + 1.0f;
    return sum * (vec)((__builtin_convertvector(whole, ints) + 127) << 23);
}

static inline vec sigmoid(vec x) { return 1.0f / (1.0f + power_of_two(x * -1.44269504f)); }

/* 2 sigmoid(2 x) - 1 */
static inline vec tanh_of(vec x) { return 2.0f / (1.0f + power_of_two(x * -2.88539008f)) - 1.0f; }
