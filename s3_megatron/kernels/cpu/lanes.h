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
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define S3_INLINE __attribute__((always_inline)) static inline

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

template <class Register> struct Lanes {
    Register of[REGISTERS];
};
typedef Lanes<FloatRegister> Floats;
typedef Lanes<IntRegister> Ints;  // comparisons give these: -1 or 0
typedef Lanes<BitRegister> Bits;
typedef Lanes<HalfRegister> Halves;

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
S3_INLINE Floats mul_add(float a, Floats b, Floats c) { return mul_add(all(a), b, c); }
S3_INLINE Floats mul_add(Floats a, Floats b, float c) { return mul_add(a, b, all(c)); }

S3_INLINE int64_t bytes_of(S3Type type) { return type == S3_FLOAT32 ? 4 : 2; }

// One register at a time: a copy of all would pass through the stack.
template <class R, class Element> S3_INLINE Lanes<R> fetch(const Element *from) {
    Lanes<R> result;
    S3_EACH memcpy(&result.of[k], from + k * REGISTER, sizeof(R));
    return result;
}
template <class R, class Element> S3_INLINE void put(Lanes<R> x, Element *to) {
    S3_EACH memcpy(to + k * REGISTER, &x.of[k], sizeof(R));
}

// Asks for what is 512 elements ahead: the CPU's own prefetcher falls behind four streams read in strides of several
// registers (without it the loop took 1.3 times as long, measured on Sapphire Rapids).
S3_INLINE void prefetch(const void *from, int64_t at, S3Type type) {
    const uint8_t *ahead = (const uint8_t *)from + (at + 512) * bytes_of(type);
    S3_EACH __builtin_prefetch(ahead + k * REGISTER * bytes_of(type), 1);
}

S3_INLINE Floats load(const void *from, int64_t at, S3Type type) {
    if (type == S3_FLOAT32) return fetch<FloatRegister>((const float *)from + at);
    const Halves half = fetch<HalfRegister>((const uint16_t *)from + at);
    const Bits low = convert<BitRegister>(half);
    if (type == S3_BFLOAT16) return from_bits(low << 16u);
    // Shift the exponent by 112: a multiplication, which does it for subnormal numbers as well. Infinities by hand.
    const Bits size = (low & 0x7fffu) << 13u;
    const Bits scaled = bits(from_bits(size) * 0x1p112f);
    return from_bits(select(size >= 0x0f800000u, size | 0x7f800000u, scaled) | (low & 0x8000u) << 16u);
}

// bfloat16 from float32: `carry` is 0x7fff plus the last bit kept for nearest even, or 16 random bits.
S3_INLINE Halves to_bfloat16(Floats x, Bits carry) {
    const Bits i = bits(x);
    const Bits nan = every(0x00400000u) | i;
    return convert<HalfRegister>(select((i & 0x7fffffffu) > 0x7f800000u, nan, i + carry) >> 16u);
}

S3_INLINE Halves nearest_bfloat16(Floats x) {
#if defined(__AVX512BF16__)
    // The instruction takes subnormal numbers for 0.
    int subnormal = 0;
    S3_EACH subnormal |= _mm512_fpclass_ps_mask((__m512)x.of[k], 0x20);
    if (__builtin_expect(!subnormal, 1)) {
        Halves result;
        S3_EACH result.of[k] = (HalfRegister)_mm512_cvtneps_pbh((__m512)x.of[k]);
        return result;
    }
#endif
    return to_bfloat16(x, ((bits(x) >> 16u) & 1u) + 0x7fffu);
}

S3_INLINE Halves to_float16(Floats x) {
    const Bits i = bits(x) & 0x7fffffffu;
    // Normal numbers round by adding half a unit of their last bit; subnormal ones by adding 0.5, whose last bit is
    // float16's smallest number.
    const Bits normal = (i + 0x0fffu + ((i >> 13u) & 1u) - (112u << 23u)) >> 13u;
    const Bits subnormal = bits(from_bits(i) + 0.5f) - 0x3f000000u;
    const Bits large = select(i > 0x7f800000u, every(0x7e00u), every(0x7c00u));
    const Bits rounded = select(i >= 0x477ff000u, large, select(i < 0x38800000u, subnormal, normal));
    return convert<HalfRegister>(rounded | ((bits(x) >> 16u) & 0x8000u));
}

S3_INLINE void store(Halves half, void *to, int64_t at) { put(half, (uint16_t *)to + at); }

S3_INLINE void store(Floats x, void *to, int64_t at, S3Type type) {
    if (type == S3_FLOAT32)
        put(x, (float *)to + at);
    else
        store(type == S3_BFLOAT16 ? nearest_bfloat16(x) : to_float16(x), to, at);
}

// 16 bits from a hash of the step's seed and the element's number.
S3_INLINE Bits noise(uint32_t seed, int64_t number) {
    static const struct Count {
        uint32_t up[64];
        constexpr Count() : up() {
            for (uint32_t i = 0; i < 64; ++i) up[i] = i;
        }
    } count;
    Bits z = fetch<BitRegister>(count.up);
    z = (z + (uint32_t)number) * 0x9e3779b9u + (seed ^ (uint32_t)(number >> 32) * 0x85ebca6bu);
    z = (z ^ (z >> 16u)) * 0x85ebca6bu;
    z = (z ^ (z >> 13u)) * 0xc2b2ae35u;
    return (z ^ (z >> 16u)) & 0xffffu;
}
}  // namespace S3_LOOP
