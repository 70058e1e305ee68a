// The S3 step over one run of contiguous elements. Compiled once for every kind of CPU in build.py's list, each time
// with its own flags and S3_LOOP (a namespace); dispatch.cpp chooses when it runs.
//
// Where memory is fast this loop is bound by arithmetic, so operations are counted: no division for p = 2 and 3, and
// both roots from a guess by the exponent's bits and one polynomial.

#include "lanes.h"

namespace S3_LOOP {

// Powers and roots of normalized numbers, to about float32's rounding. `h` tells how far the guess y of an inverse root
// is off: |h| <= 0.103 (0.069 for squares); the polynomials, minimax there, are ((1 - h)^e - 1) / h. An error of z
// reappears in h, so that a root takes over a third (half) of it, and the last rounding.
struct Guess {
    Floats y, z, h;
};

template <int P> struct Power;

template <> struct Power<1> {
    S3_INLINE Floats power(Floats t, float) { return t; }
    S3_INLINE Floats root(Floats q, float) { return q; }
    S3_INLINE Floats inverse_root(Floats c, float) { return 1.0f / c; }
};

template <> struct Power<2> {
    S3_INLINE Floats power(Floats t, float) { return t * t; }
    S3_INLINE Guess guess(Floats v) {
        const Floats y = from_bits(0x5f374686u - (bits(v) >> 1u)), z = v * y;
        return {y, z, mul_add(-1.0f * z, y, 1.0f)};
    }
    S3_INLINE Floats polynomial(Floats h) {
        return mul_add(h, mul_add(h, mul_add(h, all(0.27495068f), 0.31393698f), 0.37499771f), 0.49999833f);
    }
    S3_INLINE Floats root(Floats q, float) {
        const Guess g = guess(q);
        return mul_add(g.z * g.h, polynomial(g.h), g.z);
    }
    S3_INLINE Floats inverse_root(Floats c, float) {
        const Guess g = guess(c);
        return mul_add(g.y * g.h, polynomial(g.h), g.y);
    }
};

template <> struct Power<3> {
    S3_INLINE Floats power(Floats t, float) { return t * t * t; }
    S3_INLINE Guess guess(Floats v) {
        // The exponent's third by a float multiplication: an integer division by three is slow.
        const Floats number = convert<FloatRegister>(cast<IntRegister>(v));
        const Floats third = mul_add(all(-1.0f / 3.0f), number, 1419900202.0f);
        const Floats y = cast<FloatRegister>(convert<IntRegister>(third)), z = v * (y * y);
        return {y, z, mul_add(-1.0f * z, y, 1.0f)};
    }
    S3_INLINE Floats root(Floats q, float) {
        const Guess g = guess(q);
        const Floats a = mul_add(g.h, mul_add(g.h, all(0.42874029f), 0.45854750f), 0.49380088f);
        return mul_add(g.z * g.h, mul_add(g.h, mul_add(g.h, a, 0.55553651f), 0.66666669f), g.z);
    }
    S3_INLINE Floats inverse_root(Floats c, float) {
        const Guess g = guess(c);
        const Floats a = mul_add(g.h, all(0.14578986f), 0.17447701f);
        return mul_add(g.y * g.h, mul_add(g.h, mul_add(g.h, a, 0.22221580f), 0.33332908f), g.y);
    }
};

// Any exponent, by logarithm and exponential to base 2, for numbers in [0, 1].
template <> struct Power<0> {
    S3_INLINE Floats logarithm(Floats v) {
        // v = 2^e (1 + x) with 1 + x between sqrt(1/2) and sqrt(2), so that log(1 + x) is exact near v = 1.
        const Bits shifted = bits(v) - 0x3f3504f3u;
        const Floats e = convert<FloatRegister>(cast<IntRegister>(shifted) >> 23);
        const Floats x = from_bits((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
        Floats a = mul_add(x, all(-0.14574522f), 0.23689179f);
        a = mul_add(x, mul_add(x, mul_add(x, a, -0.25006938f), 0.28670728f), -0.36008719f);
        a = mul_add(x, mul_add(x, mul_add(x, a, 0.48093945f), -0.72135717f), 1.44269478f);
        return mul_add(x, a, e);
    }
    S3_INLINE Floats exponential(Floats y) {
        y = larger(y, all(-126.0f));
        // Adding 1.5 * 2^23 leaves the nearest whole number in the last bits.
        const Floats whole = y + 12582912.0f, f = y - (whole - 12582912.0f);
        Floats a = mul_add(f, all(0.00015353369f), 0.0013398877f);
        a = mul_add(f, mul_add(f, a, 0.0096184369f), 0.055503324f);
        a = mul_add(f, mul_add(f, mul_add(f, a, 0.24022648f), 0.69314718f), 1.0f);
        return from_bits(bits(a) + ((bits(whole) - 0x4b400000u) << 23u));
    }
    S3_INLINE Floats power(Floats t, float p) { return select(t > 0.0f, exponential(p * logarithm(t)), all(0.0f)); }
    S3_INLINE Floats root(Floats q, float p) { return power(q, 1.0f / p); }
    S3_INLINE Floats inverse_root(Floats c, float p) { return exponential((-1.0f / p) * logarithm(c)); }
};

// Sums of one run; float32 lanes are emptied into doubles before they lose digits.
struct Tally {
    Floats sum{}, largest{};
    Ints saturated{}, agreeing{};

    void empty_into(S3Statistics &out) {
        for (int64_t i = 0; i < WIDTH; ++i) {
            const int64_t k = i / REGISTER, j = i % REGISTER;
            out.sum += sum.of[k][j];
            out.largest = largest.of[k][j] > out.largest ? largest.of[k][j] : out.largest;
            out.saturated += saturated.of[k][j];
            out.agreeing += agreeing.of[k][j];
        }
        *this = Tally{};
    }
};

S3_INLINE void count(Tally &tally, Floats u, Floats g) {
    const Floats a = magnitude(u);
    tally.sum = tally.sum + a;
    tally.largest = larger(a, tally.largest);
    tally.saturated = tally.saturated - (a > 0.9f);
    tally.agreeing = tally.agreeing - (((bits(u) ^ bits(g)) < 0x80000000u) & (u != 0.0f) & (g != 0.0f));
}

S3_INLINE void store_state(Floats x, void *to, int64_t at, const S3Settings &s, int kind, int64_t number) {
    if (s.stochastic)
        store(to_bfloat16(x, noise(s.seed[kind], number)), to, at);
    else
        store(x, to, at, s.state);
}

// Elements [at, at + WIDTH) of a row.
template <int P>
S3_INLINE void move(const S3Row &row, int64_t at, int64_t number, const S3Settings &s, Tally *tally) {
    prefetch(row.param, at, s.param);
    prefetch(row.grad, at, s.grad);
    prefetch(row.exp_avg, at, s.state);
    prefetch(row.root, at, s.state);
    const Floats x0 = load(row.param, at, s.param), g = load(row.grad, at, s.grad) * s.scale;
    const Floats m0 = load(row.exp_avg, at, s.state), r0 = load(row.root, at, s.state);
    const Floats a = magnitude(g);
    // Beyond a quarter of the range, and for NaN, nothing changes: g - m would overflow.
    const Ints ok = a <= 0x1.fffffep125f;

    const Floats ga = s.one_minus_beta1 * g;
    const Floats m1 = mul_add(s.beta1, m0, ga);
    const Floats n = s.nesterov ? mul_add(s.beta1, m1, ga) : m1;

    // Where nothing is remembered r must not set the scale: under it a far smaller gradient's power would be 0.
    const Floats old = s.forgets ? all(0.0f) : r0;
    const Floats largest = larger(a, old);
    Floats tr, ta, whole, part;
    if (P == 0) {
        // Large powers need the exact maximum, which makes one of the two 1.
        whole = larger(largest, all(0x1p-126f));
        part = 1.0f / whole;
        tr = old / whole;
        ta = a / whole;
    } else {
        // The power of two of the largest, read off its exponent. Subnormal numbers are lifted by as much as there
        // is, to 2^-23 at least, whose cube is far from float32's end.
        const Bits e = larger(bits(largest) & 0x7f800000u, every(0x00800000u));
        whole = from_bits(e);
        part = from_bits(0x7f000000u - e);
        tr = old * part;
        ta = a * part;
    }
    const Floats pa = s.one_minus_beta2 * Power<P>::power(ta, s.p);
    const Floats q = mul_add(s.beta2, Power<P>::power(tr, s.p), pa);
    const Floats c = s.nesterov ? mul_add(s.beta2, q, pa) : q;
    const Floats r1 = Power<P>::root(q, s.p) * whole;
    // Where b is 0 or subnormal the coordinate rests: 0/0, or a quotient of what rounding left.
    const Floats reach = Power<P>::inverse_root(c, s.p) * part;
    Floats u = select(reach <= 0x1p126f, n * reach, all(0.0f));
    u = select(u > s.bound, all(s.bound), u);
    u = select(u < -s.bound, all(-s.bound), u);
    const Floats x1 = mul_add(-s.lr, mul_add(s.weight_decay, x0, u), x0);

    const Floats x = select(ok, x1, x0);
    store(x, row.param, at, s.param);
    store_state(select(ok, m1, m0), row.exp_avg, at, s, 0, number);
    store_state(select(ok, r1, r0), row.root, at, s, 1, number);
    if (row.model) store(x, row.model, at, s.model);
    if (tally) count(*tally, select(ok, u, all(0.0f)), g);
}

// One copy for any settings, and for the ends of rows. Its results are those of the copies below to the bit.
template <int P>
__attribute__((noinline)) static void move_any(const S3Row &row, int64_t at, int64_t number, const S3Settings &s,
                                               Tally *tally) {
    move<P>(row, at, number, s, tally);
}

// What the usual run is like, known when compiled: float32 weights and gradients, look-ahead, and states of one type.
enum Kind { ANY, FLOAT32_STATES, BFLOAT16_STATES };

static Kind kind_of(const S3Settings &s) {
    const bool usual = s.param == S3_FLOAT32 && s.grad == S3_FLOAT32 && s.nesterov && !s.stochastic && !s.forgets;
    return !usual ? ANY : s.state == S3_FLOAT32 ? FLOAT32_STATES : s.state == S3_BFLOAT16 ? BFLOAT16_STATES : ANY;
}

template <int P, Kind KIND>
static void run(const S3Row &its_row, int64_t begin, int64_t end, int64_t first, const S3Settings &settings,
                S3Statistics *out) {
    // Copies, which no store to a tensor can change: their fields stay in registers.
    const S3Row row = its_row;
    S3Settings s = settings;
    if (KIND != ANY) {
        s.param = s.grad = S3_FLOAT32;
        s.state = KIND == FLOAT32_STATES ? S3_FLOAT32 : S3_BFLOAT16;
        s.nesterov = 1;
        s.stochastic = s.forgets = 0;
    }
    constexpr int64_t BLOCK = 1024;  // float32 sums of 256 updates a lane at most
    Tally tally;
    int64_t at = begin;
    while (at + WIDTH <= end) {
        const int64_t stop = end - at < BLOCK ? end : at + BLOCK;
        if (KIND == ANY) {
            for (; at + WIDTH <= stop; at += WIDTH) move_any<P>(row, at, first + at, s, out ? &tally : nullptr);
        } else if (out) {
            for (; at + WIDTH <= stop; at += WIDTH) move<P>(row, at, first + at, s, &tally);
        } else {
            for (; at + WIDTH <= stop; at += WIDTH) move<P>(row, at, first + at, s, nullptr);
        }
        if (out) tally.empty_into(*out);
    }
    if (at < end) {
        // The rest goes through the same arithmetic, in a copy padded with zeros, so that a result depends on nothing
        // but its own element.
        uint8_t copy[5][WIDTH * 4] = {};
        void *const whole[5] = {row.param, (void *)row.grad, row.exp_avg, row.root, row.model};
        const int64_t bytes[5] = {bytes_of(s.param), bytes_of(s.grad), bytes_of(s.state), bytes_of(s.state),
                                  bytes_of(s.model)};
        for (int i = 0; i < 5; ++i)
            if (whole[i]) memcpy(copy[i], (uint8_t *)whole[i] + at * bytes[i], (end - at) * bytes[i]);
        const S3Row rest = {copy[0], copy[1], copy[2], copy[3], row.model ? copy[4] : nullptr, WIDTH};
        move_any<P>(rest, 0, first + at, settings, out ? &tally : nullptr);
        for (int i = 0; i < 5; ++i)
            if (whole[i] && i != 1) memcpy((uint8_t *)whole[i] + at * bytes[i], copy[i], (end - at) * bytes[i]);
        if (out) tally.empty_into(*out);
    }
    if (out) out->elements += end - begin;
}

template <Kind KIND>
static void choose(const S3Row &row, int64_t begin, int64_t end, int64_t first, const S3Settings &s, S3Statistics *out) {
    (s.form == 1 ? run<1, KIND> : s.form == 2 ? run<2, KIND> : s.form == 3 ? run<3, KIND> : run<0, KIND>)(
        row, begin, end, first, s, out);
}

void range(const S3Row &row, int64_t begin, int64_t end, int64_t first, const S3Settings &s, S3Statistics *out) {
    const Kind kind = kind_of(s);
    (kind == FLOAT32_STATES    ? choose<FLOAT32_STATES>
     : kind == BFLOAT16_STATES ? choose<BFLOAT16_STATES>
                               : choose<ANY>)(row, begin, end, first, s, out);
}
}  // namespace S3_LOOP
