// The SoftSignum step over one run of contiguous elements, compiled as step.cpp is. A hard step is bound by memory, 20
// bytes an element in float32; a soft one has some thirty operations, which take about as long.

#include "walk.h"

namespace S3_LOOP {

// By e = exp(-2a) - 1, of which it is -e / (e + 2): to 3 units in the last place, odd, at most 1 and 1 from a = 9.02 on.
// For small y it is y, denormals included; NaN stays.
S3_INLINE Floats tanh_of(Floats y) {
    // From 10 on it is 1. Of a NaN the maximum is its second operand.
    const Floats x = larger(all(-20.0f), magnitude(y) * -2.0f);
    // x = k ln 2 + r: in the last bits of a number this large stands k. ln 2 in two parts, k times the first exact.
    constexpr float ROUND = 0x1.8p23f;
    const Floats rounded = mul_add(0x1.715476p0f, x, all(ROUND)), k = rounded - ROUND;
    const Floats r = mul_add(-0x1.7f7d1cp-20f, k, mul_add(-0x1.62e4p-1f, k, x));
    // exp(r) - 1 = r + r^2 * series for |r| <= 0.35, to a quarter of a unit (a minimax fit).
    Floats series = mul_add(r, all(0x1.6bebfep-10f), 0x1.1227bp-7f);
    series = mul_add(r, series, 0x1.555674p-5f);
    series = mul_add(r, series, 0x1.5554bp-3f);
    series = mul_add(r, series, 0x1.fffffep-2f);
    const Floats power = from_bits((bits(rounded) << 23u) + 0x3f800000u);  // 2^k
    const Floats e = mul_add(power, mul_add(r * r, series, r), power - 1.0f);
    const Floats u = magnitude(e) / (e + 2.0f);
    return from_bits(bits(u) | (bits(y) & 0x80000000u));
}

// 0 below the smallest normal number, else the sign; NaN stays.
S3_INLINE Floats sign_of(Floats n) {
    constexpr float SMALLEST = 0x1p-126f;
    const Floats a = magnitude(n), sign = from_bits(bits(all(1.0f)) | (bits(n) & 0x80000000u));
    return select(a < SMALLEST, all(0.0f), select(a >= SMALLEST, sign, n));
}

// beta * from + (1 - beta) * to, with the smaller weight rounded once, so that an average of equals is their number.
S3_INLINE Floats average(Floats from, Floats to, const S3Settings &s) {
    if (s.beta1 >= 0.5f) return mul_add(s.one_minus_beta1, to - from, from);
    return mul_add(s.beta1, from - to, to);
}

S3_INLINE Floats update(Floats n, const S3Settings &s) {
    return s.tau < __builtin_inff() ? tanh_of(n * s.tau) : sign_of(n);
}

S3_INLINE Bits random_of(int64_t number, const S3Settings &s) {
    return s.stochastic ? noise(s.seed, number) & 0xffffu : every(0);
}

// WIDTH elements, of any gradients.
S3_INLINE void move(const S3Row &row, int64_t at, int64_t number, const S3Settings &s, Tally *tally) {
    for (int kind = S3_PARAM; kind <= S3_EXP_AVG; ++kind) prefetch(row, kind, at, s);
    const Floats g = gradient(row, at, s), m0 = load(row, S3_EXP_AVG, at, s);
    const Ints ok = magnitude(g) <= LARGEST;
    const Floats m = average(m0, g, s), u = update(s.nesterov ? average(m, g, s) : m, s);
    const Floats x = load(row, S3_PARAM, at, s);
    store_weight(select(ok, moved(x, u, s), x), row, at, s);
    store_state(select(ok, m, m0), row.at[S3_EXP_AVG], at, s, random_of(number, s));
    if (tally) count(*tally, select(ok, u, all(0.0f)), g);
}

// One copy for any types, and for the ends of rows.
__attribute__((noinline)) static void move_any(const S3Row &row, int64_t at, int64_t number, const S3Settings &s,
                                               Tally *tally) {
    move(row, at, number, s, tally);
}

// Moves elements from `at` on, until fewer than WIDTH are left before `end`, or a span ends or in it a gradient is beyond
// LARGEST, and returns where it stopped.
S3_INLINE int64_t move_sound(const S3Row &row, int64_t at, int64_t end, int64_t first, const S3Settings &s,
                             Tally *tally) {
    if (WIDE) {
        for (; at + WIDTH <= end; at += WIDTH) move(row, at, first + at, s, tally);
        return at;
    }
    alignas(64) float n[SPAN];
    int64_t count = 0;
    const int64_t most = end - at < SPAN ? end - at : SPAN;
    for (; count + WIDTH <= most; count += WIDTH) {
        const Floats g = gradient(row, at + count, s);
        if (any_above(magnitude(g), LARGEST)) break;
        const Floats m = average(load(row, S3_EXP_AVG, at + count, s), g, s);
        put(s.nesterov ? average(m, g, s) : m, n + count);
        store_state(m, row.at[S3_EXP_AVG], at + count, s, random_of(first + at + count, s));
    }
    for (int64_t i = 0; i < count; i += WIDTH) {
        for (int kind = S3_PARAM; kind <= S3_EXP_AVG; ++kind) prefetch(row, kind, at + i, s);
        const Floats u = update(fetch<FloatRegister>(n + i), s);
        store_weight(moved(load(row, S3_PARAM, at + i, s), u, s), row, at + i, s);
        if (tally) S3_LOOP::count(*tally, u, gradient(row, at + i, s));
    }
    return at + count;
}

// What the usual run is like, known when compiled: float32 weights and gradients.
enum SoftKind { SOFT_ANY, SOFT_FLOAT32, SOFT_BFLOAT16 };

template <SoftKind KIND>
static void run_soft(const S3Row &its_row, int64_t begin, int64_t end, int64_t first, const S3Settings &settings,
                     S3Statistics *out) {
    // Copies, which no store to a tensor can change: their fields stay in registers.
    const S3Row row = its_row;
    S3Settings s = settings;
    if (KIND != SOFT_ANY) {
        s.types[S3_PARAM] = s.types[S3_GRAD] = S3_FLOAT32;
        s.types[S3_EXP_AVG] = KIND == SOFT_FLOAT32 ? S3_FLOAT32 : S3_BFLOAT16;
    }
    walk(
        its_row, begin, end, settings, out,
        [&](int64_t at, int64_t stop, Tally *tally) S3_INLINED {
            return KIND == SOFT_ANY ? at : move_sound(row, at, stop, first, s, tally);
        },
        [&](const S3Row &its, int64_t at, int64_t number, Tally *tally) {
            move_any(its, at, first + number, settings, tally);
        });
}

void softsignum_range(const S3Row &row, int64_t begin, int64_t end, int64_t first, const S3Settings &s,
                      S3Statistics *out) {
    const bool usual = s.types[S3_PARAM] == S3_FLOAT32 && s.types[S3_GRAD] == S3_FLOAT32;
    (!usual                              ? run_soft<SOFT_ANY>
     : s.types[S3_EXP_AVG] == S3_FLOAT32 ? run_soft<SOFT_FLOAT32>
                                         : run_soft<SOFT_BFLOAT16>)(row, begin, end, first, s, out);
}
}  // namespace S3_LOOP
