// How weights, gradients and states are stored: float32 lanes from any of them, and back; and stochastic rounding's noise.

#pragma once
#include "lanes.h"

namespace S3_LOOP {
S3_INLINE int64_t bytes_of(S3Type type) { return type == S3_FLOAT32 ? 4 : 2; }

// 16-bit numbers as 32-bit ones and back, of which the upper half is 0. Written out: what the compiler makes of a
// conversion of vectors takes twice the instructions.
S3_INLINE Bits fetch_halves(const uint16_t *from) {
    Bits result;
#if defined(__AVX512F__)
    S3_EACH result.of[k] = (BitRegister)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from + k));
#elif defined(__AVX2__)
    S3_EACH result.of[k] = (BitRegister)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from + k));
#else
    S3_EACH {
        HalfRegister half;
        memcpy(&half, from + k * REGISTER, sizeof half);
        result.of[k] = __builtin_convertvector(half, BitRegister);
    }
#endif
    return result;
}
S3_INLINE void put_halves(Bits x, uint16_t *to) {
#if defined(__AVX512F__)
    S3_EACH _mm256_storeu_si256((__m256i *)to + k, _mm512_cvtepi32_epi16((__m512i)x.of[k]));
#elif defined(__AVX2__)
    // Two registers are packed into one, a quarter of each at a time.
    for (int k = 0; k + 1 < REGISTERS; k += 2) {
        const __m256i packed = _mm256_packus_epi32((__m256i)x.of[k], (__m256i)x.of[k + 1]);
        _mm256_storeu_si256((__m256i *)(to + k * REGISTER), _mm256_permute4x64_epi64(packed, 0xd8));
    }
    if (REGISTERS % 2) {
        const __m256i last = (__m256i)x.of[REGISTERS - 1];
        const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(last), _mm256_extracti128_si256(last, 1));
        _mm_storeu_si128((__m128i *)(to + (REGISTERS - 1) * REGISTER), packed);
    }
#else
    S3_EACH {
        const HalfRegister half = __builtin_convertvector(x.of[k], HalfRegister);
        memcpy(to + k * REGISTER, &half, sizeof half);
    }
#endif
}

S3_INLINE Floats fetch_bfloat16(const uint16_t *from) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if (REGISTERS == 2) {
        // Two registers of one: put in order first, for unpacking goes by halves of a register; zeros below each.
        const __m256i all = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *)from), 0xd8);
        const __m256i zero = _mm256_setzero_si256();
        Bits result;
        result.of[0] = (BitRegister)_mm256_unpacklo_epi16(zero, all);
        result.of[REGISTERS - 1] = (BitRegister)_mm256_unpackhi_epi16(zero, all);
        return from_bits(result);
    }
#endif
    return from_bits(fetch_halves(from) << 16u);
}

S3_INLINE Floats fetch_float16(const uint16_t *from) {
    const Bits low = fetch_halves(from);
    // Shift the exponent by 112: a multiplication, which does it for subnormal numbers as well. Infinities by hand.
    const Bits size = (low & 0x7fffu) << 13u;
    const Bits scaled = bits(from_bits(size) * 0x1p112f);
    return from_bits(select(size >= 0x0f800000u, size | 0x7f800000u, scaled) | (low & 0x8000u) << 16u);
}

S3_INLINE Floats load(const void *from, int64_t at, S3Type type) {
    if (type == S3_FLOAT32) return fetch<FloatRegister>((const float *)from + at);
    const uint16_t *const half = (const uint16_t *)from + at;
    return type == S3_BFLOAT16 ? fetch_bfloat16(half) : fetch_float16(half);
}

// What makes cutting off the lower half round to nearest even: a half, less a little where the last bit kept is even.
S3_INLINE Bits to_nearest(Floats x) { return ((bits(x) >> 16u) & 1u) + 0x7fffu; }

#if defined(__AVX512BF16__)
// By the CPU's own instruction, which takes subnormal numbers for 0; false, and nothing stored, where there is one.
S3_INLINE bool put_normal_bfloat16(Floats x, uint16_t *to) {
    __mmask16 subnormal = 0;
    S3_EACH subnormal = _kor_mask16(subnormal, _mm512_fpclass_ps_mask((__m512)x.of[k], 0x20));
    if (__builtin_expect(subnormal, 0)) return false;
    S3_EACH _mm256_storeu_si256((__m256i *)to + k, (__m256i)_mm512_cvtneps_pbh((__m512)x.of[k]));
    return true;
}
#else
S3_INLINE bool put_normal_bfloat16(Floats, uint16_t *) { return false; }
#endif

S3_INLINE void put_bfloat16(Floats x, uint16_t *to) {
    if (put_normal_bfloat16(x, to)) return;
    const Bits i = bits(x);
    put_halves(select((i & 0x7fffffffu) > 0x7f800000u, i | 0x00400000u, i + to_nearest(x)) >> 16u, to);
}

S3_INLINE void put_float16(Floats x, uint16_t *to) {
    const Bits i = bits(x) & 0x7fffffffu;
    // Normal numbers round by adding half a unit of their last bit; subnormal ones by adding 0.5, whose last bit is
    // float16's smallest number.
    const Bits normal = (i + 0x0fffu + ((i >> 13u) & 1u) - (112u << 23u)) >> 13u;
    const Bits subnormal = bits(from_bits(i) + 0.5f) - 0x3f000000u;
    const Bits large = select(i > 0x7f800000u, every(0x7e00u), every(0x7c00u));
    const Bits rounded = select(i >= 0x477ff000u, large, select(i < 0x38800000u, subnormal, normal));
    put_halves(rounded | ((bits(x) >> 16u) & 0x8000u), to);
}

S3_INLINE void store(Floats x, void *to, int64_t at, S3Type type) {
    uint16_t *const half = (uint16_t *)to + at;
    if (type == S3_FLOAT32)
        put(x, (float *)to + at);
    else if (type == S3_BFLOAT16)
        put_bfloat16(x, half);
    else
        put_float16(x, half);
}

S3_INLINE Floats load(const S3Row &row, S3Kind kind, int64_t at, const S3Settings &s) {
    return load(row.at[kind], at, s.types[kind]);
}

// Beyond a quarter of the range, and for NaN, nothing changes: g - m would overflow.
constexpr float LARGEST = 0x1.fffffep125f;

S3_INLINE Floats gradient(const S3Row &row, int64_t at, const S3Settings &s) {
    return load(row, S3_GRAD, at, s) * s.factor;
}

// A weight after an update, with decoupled decay.
S3_INLINE Floats moved(Floats x, Floats u, const S3Settings &s) {
    return mul_add(-s.lr, mul_add(s.weight_decay, x, u), x);
}

// And the model's, where there is one.
S3_INLINE void store_weight(Floats x, const S3Row &row, int64_t at, const S3Settings &s) {
    store(x, row.at[S3_PARAM], at, s.types[S3_PARAM]);
    if (row.at[S3_MODEL]) store(x, row.at[S3_MODEL], at, s.types[S3_MODEL]);
}

// m and r, read and written together: with their like in foreach (kernels/formats) and Triton the only places that know
// how states are stored.
struct States {
    Floats m, r;
};
S3_INLINE States load_states(const S3Row &row, int64_t at, const S3Settings &s) {
    return {load(row, S3_EXP_AVG, at, s), load(row, S3_ROOT, at, s)};
}

// One of them, rounded by its 16 random bits or to nearest. In bfloat16 NaN needs no care: it comes from a bfloat16 state
// or is the CPU's own, so that adding to its lower half, which is 0, leaves the upper as it is.
S3_INLINE void store_state(Floats x, void *to, int64_t at, const S3Settings &s, Bits random) {
    uint16_t *const half = (uint16_t *)to + at;
    if (s.types[S3_EXP_AVG] == S3_FLOAT32)
        put(x, (float *)to + at);
    else if (s.stochastic)
        put_halves((bits(x) + random) >> 16u, half);
    else if (!put_normal_bfloat16(x, half))
        put_halves((bits(x) + to_nearest(x)) >> 16u, half);
}
// `random`: 16 bits for each.
S3_INLINE void store_states(States x, const S3Row &row, int64_t at, const S3Settings &s, Bits random) {
    store_state(x.m, row.at[S3_EXP_AVG], at, s, random & 0xffffu);
    store_state(x.r, row.at[S3_ROOT], at, s, random >> 16u);
}

// 32 random bits an element, 16 for each of its states: a hash of its number and the step's two keys. AVX2 multiplies
// 32-bit integers slowly, so two multiplications do; the second key keeps one step's noise from being another's shifted.
S3_INLINE Bits noise(const uint32_t key[2], int64_t number) {
    static const struct Count {
        uint32_t up[64];
        constexpr Count() : up() {
            for (uint32_t i = 0; i < 64; ++i) up[i] = i * 0x9e3779b9u;
        }
    } count;
    const uint32_t first = (uint32_t)number * 0x9e3779b9u + (key[0] ^ (uint32_t)(number >> 32) * 0x85ebca6bu);
    Bits z = fetch<BitRegister>(count.up) + first;
    z = (z ^ (z >> 16u)) * 0x7feb352du + key[1];
    z = (z ^ (z >> 15u)) * 0x846ca68bu;
    return z ^ (z >> 16u);
}
}  // namespace S3_LOOP
