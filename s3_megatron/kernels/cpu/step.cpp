// The S3 step over one run of contiguous elements. Compiled once for every kind of CPU in build.py's list, each time
// with its own flags and S3_LOOP (a namespace); dispatch.cpp chooses when it runs.
//
// Where memory is fast this loop is bound by arithmetic, so operations are counted: no division for p = 2 and 3, and
// both roots from a guess by the exponent's bits and one polynomial.

#include "powers.h"
#include "walk.h"

namespace S3_LOOP {

// m and its look-ahead, n.
struct Average {
    Floats m, n;
};
S3_INLINE Average average(Floats m0, Floats g, const S3Settings &s) {
    const Floats ga = s.one_minus_beta1 * g, m = mul_add(s.beta1, m0, ga);
    return {m, s.nesterov ? mul_add(s.beta1, m, ga) : m};
}

// The mean of the powers and its look-ahead, of numbers divided by `whole`: r is root(q) * whole, b is root(c) * whole.
struct Means {
    Floats q, c, whole;
};
template <int P> S3_INLINE Means means(Floats a, Floats r0, const S3Settings &s) {
    // Where nothing is remembered r must not set the scale: under it a far smaller gradient's power would be 0.
    const Floats old = s.forgets ? all(0.0f) : r0;
    Floats whole = larger(a, old), ta, tr;
    if (P == 0) {
        // Large powers need the exact maximum, which makes one of the two 1. 0/0 does no harm: its root is multiplied
        // by 0.
        const Ints grows = a >= old;
        const Floats t = select(grows, old, a) / whole;
        const Floats power = Power<0>::power(select(t < 1.0f, t, all(1.0f)), s.p);
        ta = select(grows, all(1.0f), power);
        tr = select(grows, power, all(1.0f));
    } else {
        // The power of two of the largest, read off its exponent. Subnormal numbers are lifted by as much as there
        // is, to 2^-23 at least, whose cube is far from float32's end.
        const Bits e = larger(bits(whole) & 0x7f800000u, every(0x00800000u));
        whole = from_bits(e);
        const Floats part = from_bits(0x7f000000u - e);
        ta = Power<P>::power(a * part, s.p);
        tr = Power<P>::power(old * part, s.p);
    }
    const Floats pa = s.one_minus_beta2 * ta, q = mul_add(s.beta2, tr, pa);
    return {q, s.nesterov ? mul_add(s.beta2, q, pa) : q, whole};
}

template <int P> S3_INLINE Floats root(Floats q, Floats whole, const S3Settings &s) {
    return Power<P>::root(q, s.p) * whole;
}

template <int P> S3_INLINE Floats update(Floats n, Floats c, Floats whole, const S3Settings &s) {
    const Floats inverse = Power<P>::inverse_root(c, s.p);
    const Floats inverse_b = P == 0 ? inverse / whole : inverse * from_bits(0x7f000000u - bits(whole));
    // Where b is 0 or subnormal the coordinate rests: 0/0, or a quotient of what rounding left.
    Floats u = select(inverse_b <= 0x1p126f, n * inverse_b, all(0.0f));
    u = select(u > s.bound, all(s.bound), u);
    return select(u < -s.bound, all(-s.bound), u);
}

// Elements [at, at + WIDTH) of a row: one copy for any settings and any gradients, and for the ends of rows. Its results
// are those of the loops below to the bit.
template <int P>
__attribute__((noinline)) static void move_any(const S3Row &row, int64_t at, int64_t number, const S3Settings &s,
                                               Tally *tally) {
    for (int kind = S3_PARAM; kind <= S3_ROOT; ++kind) prefetch(row, kind, at, s);
    const Floats x0 = load(row, S3_PARAM, at, s), g = gradient(row, at, s), a = magnitude(g);
    const States old = load_states(row, at, s);
    const Ints ok = a <= LARGEST;
    const Average mean = average(old.m, g, s);
    const Means powers = means<P>(a, old.r, s);
    const Floats r = root<P>(powers.q, powers.whole, s), u = update<P>(mean.n, powers.c, powers.whole, s);
    const Floats x = select(ok, moved(x0, u, s), x0);
    const Bits random = s.stochastic ? noise(s.seed, number) : every(0);
    store_weight(x, row, at, s);
    store_states({select(ok, mean.m, old.m), select(ok, r, old.r)}, row, at, s, random);
    if (tally) count(*tally, select(ok, u, all(0.0f)), g);
}

// What the usual run is like, known when compiled: float32 weights and gradients, look-ahead, and states of one type,
// rounded in one way.
enum Kind { ANY, FLOAT32_STATES, BFLOAT16_STATES, BFLOAT16_STOCHASTIC };

static Kind kind_of(const S3Settings &s) {
    const bool in_float32 = s.types[S3_PARAM] == S3_FLOAT32 && s.types[S3_GRAD] == S3_FLOAT32;
    const bool usual = in_float32 && s.nesterov && !s.forgets;
    if (!usual) return ANY;
    if (s.types[S3_EXP_AVG] == S3_FLOAT32) return FLOAT32_STATES;
    return s.stochastic ? BFLOAT16_STOCHASTIC : BFLOAT16_STATES;
}

// These two move elements from `at` on, until fewer than WIDTH are left before `end` or a gradient is beyond LARGEST, and
// return where they stopped.
template <int P>
S3_INLINE int64_t move_at_once(const S3Row &row, int64_t at, int64_t end, int64_t first, const S3Settings &s,
                               Tally *tally) {
    for (; at + WIDTH <= end; at += WIDTH) {
        for (int kind = S3_PARAM; kind <= S3_ROOT; ++kind) prefetch(row, kind, at, s);
        const Floats g = gradient(row, at, s), a = magnitude(g);
        if (any_above(a, LARGEST)) break;
        const States old = load_states(row, at, s);
        const Average mean = average(old.m, g, s);
        const Means powers = means<P>(a, old.r, s);
        const Bits random = s.stochastic ? noise(s.seed, first + at) : every(0);
        store_states({mean.m, root<P>(powers.q, powers.whole, s)}, row, at, s, random);
        const Floats u = update<P>(mean.n, powers.c, powers.whole, s);
        store_weight(moved(load(row, S3_PARAM, at, s), u, s), row, at, s);
        if (tally) count(*tally, u, g);
    }
    return at;
}

template <int P>
S3_INLINE int64_t move_sound(const S3Row &row, const int64_t at, int64_t end, int64_t first, const S3Settings &s,
                             Tally *tally) {
    if (WIDE && P != 0) return move_at_once<P>(row, at, end, first, s, tally);
    alignas(64) float m[SPAN], n[SPAN], q[SPAN], c[SPAN], whole[SPAN];
    alignas(64) uint32_t random[SPAN];
    int64_t count = 0;
    const int64_t most = end - at < SPAN ? end - at : SPAN;
    for (; count + WIDTH <= most; count += WIDTH) {
        prefetch(row, S3_GRAD, at + count, s);
        const Floats g = gradient(row, at + count, s), a = magnitude(g);
        if (any_above(a, LARGEST)) break;
        const States old = load_states(row, at + count, s);
        const Average mean = average(old.m, g, s);
        const Means powers = means<P>(a, old.r, s);
        put(mean.m, m + count);
        put(mean.n, n + count);
        put(powers.q, q + count);
        put(powers.c, c + count);
        put(powers.whole, whole + count);
        if (s.stochastic) put(noise(s.seed, first + at + count), random + count);
    }
    for (int64_t i = 0; i < count; i += WIDTH) {
        prefetch(row, S3_EXP_AVG, at + i, s);
        prefetch(row, S3_ROOT, at + i, s);
        const Floats r = root<P>(fetch<FloatRegister>(q + i), fetch<FloatRegister>(whole + i), s);
        const Bits z = s.stochastic ? fetch<BitRegister>(random + i) : every(0);
        store_states({fetch<FloatRegister>(m + i), r}, row, at + i, s, z);
    }
    for (int64_t i = 0; i < count; i += WIDTH) {
        prefetch(row, S3_PARAM, at + i, s);
        const Floats u = update<P>(fetch<FloatRegister>(n + i), fetch<FloatRegister>(c + i),
                                   fetch<FloatRegister>(whole + i), s);
        store_weight(moved(load(row, S3_PARAM, at + i, s), u, s), row, at + i, s);
        if (tally) S3_LOOP::count(*tally, u, gradient(row, at + i, s));
    }
    return at + count;
}

template <int P, Kind KIND>
static void run(const S3Row &its_row, int64_t begin, int64_t end, int64_t first, const S3Settings &settings,
                S3Statistics *out) {
    // Copies, which no store to a tensor can change: their fields stay in registers.
    const S3Row row = its_row;
    S3Settings s = settings;
    if (KIND != ANY) {
        s.types[S3_PARAM] = s.types[S3_GRAD] = S3_FLOAT32;
        s.types[S3_EXP_AVG] = s.types[S3_ROOT] = KIND == FLOAT32_STATES ? S3_FLOAT32 : S3_BFLOAT16;
        s.stochastic = KIND == BFLOAT16_STOCHASTIC;
        s.nesterov = 1;
        s.forgets = 0;
    }
    walk(
        its_row, begin, end, settings, out,
        [&](int64_t at, int64_t stop, Tally *tally) S3_INLINED {
            return KIND == ANY ? at : move_sound<P>(row, at, stop, first, s, tally);
        },
        // Not of the copies: an index that is no constant would put those into memory.
        [&](const S3Row &its, int64_t at, int64_t number, Tally *tally) {
            move_any<P>(its, at, first + number, settings, tally);
        });
}

template <Kind KIND>
static void choose(const S3Row &row, int64_t begin, int64_t end, int64_t first, const S3Settings &s, S3Statistics *out) {
    (s.form == 1     ? run<1, KIND>
     : s.form == 2   ? run<2, KIND>
     : s.form == 3   ? run<3, KIND>
     : s.form == HALVES ? run<HALVES, KIND>
                     : run<0, KIND>)(row, begin, end, first, s, out);
}

void range(const S3Row &row, int64_t begin, int64_t end, int64_t first, const S3Settings &s, S3Statistics *out) {
    const Kind kind = kind_of(s);
    (kind == FLOAT32_STATES        ? choose<FLOAT32_STATES>
     : kind == BFLOAT16_STATES     ? choose<BFLOAT16_STATES>
     : kind == BFLOAT16_STOCHASTIC ? choose<BFLOAT16_STOCHASTIC>
                                   : choose<ANY>)(row, begin, end, first, s, out);
}
}  // namespace S3_LOOP
