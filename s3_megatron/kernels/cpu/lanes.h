// Vectors of float32 for the loop in step.cpp, on GCC's and Clang's vector extensions: what the target's flags say they
// are, registers of AVX-512, AVX2, NEON or SSE.
//
// `Lanes` are several registers side by side. The step is one long chain of dependent operations, of which a CPU's
// scheduler sees less than two ahead: measured on Sapphire Rapids, four independent chains that alternate take three
// quarters of the time of one.

#pragma once
#include "step.h"

// C's headers only: an inline function of C++'s, compiled here for AVX-512, could be linked into code for every CPU.
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define S3_INLINED __attribute__((always_inline))
#define S3_INLINE S3_INLINED static inline

namespace S3_LOOP {

#if defined(__AVX512F__)
constexpr int BYTES = 64, INTERLEAVED = 4;
#elif defined(__AVX2__)
constexpr int BYTES = 32, INTERLEAVED = 2;
#else
constexpr int BYTES = 16, INTERLEAVED = 1;
#endif
#if defined(S3_REGISTERS)  // the sanitizers' build: instrumented, four chains take the compiler ten minutes
constexpr int REGISTERS = S3_REGISTERS;
#else
constexpr int REGISTERS = INTERLEAVED;
#endif
constexpr int64_t REGISTER = BYTES / 4, WIDTH = REGISTERS * REGISTER;  // elements
typedef float FloatRegister __attribute__((vector_size(BYTES)));
typedef int32_t IntRegister __attribute__((vector_size(BYTES)));
typedef uint32_t BitRegister __attribute__((vector_size(BYTES)));
typedef uint16_t HalfRegister __attribute__((vector_size(BYTES / 2)));

// a * b + c, rounded once where the CPU can. Written out, and not left to the compiler, which would choose differently
// in two copies of the loop: a weight must not depend on where in a tensor it stands. `top` is the larger of two.
S3_INLINE FloatRegister fused(FloatRegister a, FloatRegister b, FloatRegister c) {
#if defined(__AVX512F__)
    return (FloatRegister)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (FloatRegister)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (FloatRegister)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
S3_INLINE FloatRegister top(FloatRegister a, FloatRegister b) {
#if defined(__AVX512F__)
    return (FloatRegister)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (FloatRegister)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
S3_INLINE BitRegister top(BitRegister a, BitRegister b) {
#if defined(__AVX512F__)
    return (BitRegister)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (BitRegister)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
    return a > b ? a : b;
#endif
}
S3_INLINE FloatRegister rooted(FloatRegister x) {
#if defined(__AVX512F__)
    return (FloatRegister)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (FloatRegister)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (FloatRegister)_mm_sqrt_ps((__m128)x);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (FloatRegister)vsqrtq_f32((float32x4_t)x);
#else
    FloatRegister result;
    for (int64_t j = 0; j < REGISTER; ++j) result[j] = __builtin_sqrtf(x[j]);
    return result;
#endif
}

// Copied one register at a time: a copy of all would pass through the stack.
template <class Register> struct Lanes {
    Register of[REGISTERS];
    Lanes() = default;
    S3_INLINED Lanes(const Lanes &from) { *this = from; }
    S3_INLINED Lanes &operator=(const Lanes &from) {
        for (int k = 0; k < REGISTERS; ++k) of[k] = from.of[k];
        return *this;
    }
};
typedef Lanes<FloatRegister> Floats;
typedef Lanes<IntRegister> Ints;  // comparisons give these: -1 or 0
typedef Lanes<BitRegister> Bits;

#define S3_EACH for (int k = 0; k < REGISTERS; ++k)
#define S3_OPERATOR(op)                                                                                                \
    template <class R> S3_INLINE auto operator op(Lanes<R> a, Lanes<R> b)->Lanes<decltype(a.of[0] op b.of[0])> {       \
        Lanes<decltype(a.of[0] op b.of[0])> result;                                                                    \
        S3_EACH result.of[k] = a.of[k] op b.of[k];                                                                     \
        return result;                                                                                                 \
    }                                                                                                                  \
    template <class R> S3_INLINE auto operator op(Lanes<R> a, decltype(a.of[0][0] + 0) b) {                            \
        Lanes<decltype(a.of[0] op a.of[0])> result;                                                                    \
        S3_EACH result.of[k] = a.of[k] op b;                                                                           \
        return result;                                                                                                 \
    }                                                                                                                  \
    template <class R> S3_INLINE auto operator op(decltype(Lanes<R>().of[0][0] + 0) a, Lanes<R> b) {                   \
        Lanes<decltype(b.of[0] op b.of[0])> result;                                                                    \
        S3_EACH result.of[k] = a op b.of[k];                                                                           \
        return result;                                                                                                 \
    }
S3_OPERATOR(+)
S3_OPERATOR(-)
S3_OPERATOR(*)
S3_OPERATOR(/)
S3_OPERATOR(&)
S3_OPERATOR(|)
S3_OPERATOR(^)
S3_OPERATOR(<<)
S3_OPERATOR(>>)
S3_OPERATOR(<)
S3_OPERATOR(<=)
S3_OPERATOR(>)
S3_OPERATOR(>=)
S3_OPERATOR(!=)
#undef S3_OPERATOR

// Between types: the same bits, or the same numbers.
template <class To, class From> S3_INLINE Lanes<To> cast(Lanes<From> x) {
    Lanes<To> result;
    S3_EACH result.of[k] = (To)x.of[k];
    return result;
}
template <class To, class From> S3_INLINE Lanes<To> convert(Lanes<From> x) {
    Lanes<To> result;
    S3_EACH result.of[k] = __builtin_convertvector(x.of[k], To);
    return result;
}
template <class R> S3_INLINE Lanes<R> select(Ints mask, Lanes<R> yes, Lanes<R> no) {
    Lanes<R> result;
    S3_EACH result.of[k] = mask.of[k] ? yes.of[k] : no.of[k];
    return result;
}
S3_INLINE Floats all(float x) {
    Floats result;
    S3_EACH result.of[k] = x - FloatRegister{};
    return result;
}
S3_INLINE Bits every(uint32_t x) {
    Bits result;
    S3_EACH result.of[k] = x | BitRegister{};
    return result;
}
S3_INLINE Bits bits(Floats x) { return cast<BitRegister>(x); }
S3_INLINE Floats from_bits(Bits x) { return cast<FloatRegister>(x); }
S3_INLINE Floats magnitude(Floats x) { return from_bits(bits(x) & 0x7fffffffu); }
template <class R> S3_INLINE Lanes<R> larger(Lanes<R> a, Lanes<R> b) {
    Lanes<R> result;
    S3_EACH result.of[k] = top(a.of[k], b.of[k]);
    return result;
}
S3_INLINE Floats mul_add(Floats a, Floats b, Floats c) {
    Floats result;
    S3_EACH result.of[k] = fused(a.of[k], b.of[k], c.of[k]);
    return result;
}
S3_INLINE Floats square_root(Floats x) {
    Floats result;
    S3_EACH result.of[k] = rooted(x.of[k]);
    return result;
}
S3_INLINE Floats mul_add(float a, Floats b, Floats c) { return mul_add(all(a), b, c); }
S3_INLINE Floats mul_add(Floats a, Floats b, float c) { return mul_add(a, b, all(c)); }

template <class R, class Element> S3_INLINE Lanes<R> fetch(const Element *from) {
    Lanes<R> result;
    S3_EACH memcpy(&result.of[k], from + k * REGISTER, sizeof(R));
    return result;
}
template <class R, class Element> S3_INLINE void put(Lanes<R> x, Element *to) {
    S3_EACH memcpy(to + k * REGISTER, &x.of[k], sizeof(R));
}

// Whether any of these magnitudes is above `limit`, or NaN, whose bits are above those of every number.
S3_INLINE bool any_above(Floats magnitudes, float limit) {
    BitRegister largest = (BitRegister)magnitudes.of[0];
    for (int k = 1; k < REGISTERS; ++k) largest = top(largest, (BitRegister)magnitudes.of[k]);
    uint32_t bound;
    memcpy(&bound, &limit, 4);
    const IntRegister above = (IntRegister)largest > (int32_t)bound;
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)above) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)above) != 0;
#elif defined(__SSE2__)
    return _mm_movemask_ps((__m128)above) != 0;
#else
    int32_t any = 0;
    for (int64_t j = 0; j < REGISTER; ++j) any |= above[j];
    return any != 0;
#endif
}
}  // namespace S3_LOOP
