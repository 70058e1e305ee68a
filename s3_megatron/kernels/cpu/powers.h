// p-th powers and roots of float32 lanes: p = 1, 2 and 3 by polynomials of their own, any other by logarithms.

#pragma once
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
    // x (1 - h)^(-2/3), and x (1 - h)^(-1/3).
    S3_INLINE Floats two_thirds(Floats x, Floats h) {
        const Floats a = mul_add(h, mul_add(h, all(0.42874029f), 0.45854750f), 0.49380088f);
        return mul_add(x * h, mul_add(h, mul_add(h, a, 0.55553651f), 0.66666669f), x);
    }
    S3_INLINE Floats one_third(Floats x, Floats h) {
        const Floats a = mul_add(h, all(0.14578986f), 0.17447701f);
        return mul_add(x * h, mul_add(h, mul_add(h, a, 0.22221580f), 0.33332908f), x);
    }
    S3_INLINE Floats root(Floats q, float) {
        const Guess g = guess(q);
        return two_thirds(g.z, g.h);
    }
    S3_INLINE Floats inverse_root(Floats c, float) {
        const Guess g = guess(c);
        return one_third(g.y, g.h);
    }
};

// p = 1.5: t^1.5 by the CPU's square root, which every machine rounds alike; q^(2/3) by the guess of q^(-1/3).
constexpr int HALVES = 15;
template <> struct Power<HALVES> {
    S3_INLINE Floats power(Floats t, float) { return t * square_root(t); }
    S3_INLINE Floats root(Floats q, float) {
        const Guess g = Power<3>::guess(q);
        return Power<3>::one_third(q * g.y, g.h);
    }
    S3_INLINE Floats inverse_root(Floats c, float) {
        const Guess g = Power<3>::guess(c);
        return Power<3>::two_thirds(g.y * g.y, g.h);
    }
};

// Any exponent, by logarithm and exponential to base 2, for numbers in [0, 1]; roots of means, which are not small.
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
    // Of numbers from -126 to 127.
    S3_INLINE Floats exponential(Floats y) {
        // Adding 1.5 * 2^23 leaves the nearest whole number in the last bits.
        const Floats whole = y + 12582912.0f, f = y - (whole - 12582912.0f);
        Floats a = mul_add(f, all(0.00015353369f), 0.0013398877f);
        a = mul_add(f, mul_add(f, a, 0.0096184369f), 0.055503324f);
        a = mul_add(f, mul_add(f, mul_add(f, a, 0.24022648f), 0.69314718f), 1.0f);
        return from_bits(bits(a) + ((bits(whole) - 0x4b400000u) << 23u));
    }
    // 0 becomes the smallest normal number, which is nothing beside the 1 that it is added to.
    S3_INLINE Floats power(Floats t, float p) { return exponential(larger(p * logarithm(t), all(-126.0f))); }
    S3_INLINE Floats root(Floats q, float p) { return exponential((1.0f / p) * logarithm(q)); }
    S3_INLINE Floats inverse_root(Floats c, float p) { return exponential((-1.0f / p) * logarithm(c)); }
};
}  // namespace S3_LOOP
