"""SoftSignum's average and its two updates in Triton, by the formulas of cpu/softsignum.cpp."""

import triton
import triton.language as tl


@triton.jit
def average(old, new, beta, one_minus_beta):
    """``beta * old + (1 - beta) * new``, with the smaller weight rounded once: an average of equals is their number."""
    slow = tl.fma(new - old, one_minus_beta, old)
    return tl.where(beta >= 0.5, slow, tl.fma(old - new, beta, new))


@triton.jit
def tanh_of(y):
    """tanh by e = exp(-2|y|) - 1, of which it is -e / (e + 2): odd, at most 1, and y where that is small; NaN stays."""
    # From 10 on it is 1. NaN compares false.
    size = tl.abs(y)
    x = -2.0 * tl.where(size > 10.0, 10.0, size)
    # x = k ln 2 + r: in the last bits of a number this large stands k. ln 2 in two parts, k times the first exact.
    rounded = tl.fma(x, 1.4426950216293335, 12582912.0)
    k = rounded - 12582912.0
    r = tl.fma(k, -1.428606765330187e-06, tl.fma(k, -0.693145751953125, x))
    # exp(r) - 1 = r + r^2 * series for |r| <= 0.35, to a quarter of a unit (a minimax fit).
    series = tl.fma(r, 0.0013882516650483012, 0.008366547524929047)
    series = tl.fma(r, series, 0.04166720062494278)
    series = tl.fma(r, series, 0.1666654348373413)
    series = tl.fma(r, series, 0.4999999701976776)
    power = ((rounded.to(tl.uint32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)  # 2^k
    e = tl.fma(power, tl.fma(r * r, series, r), power - 1.0)
    u = tl.abs(e) / (e + 2.0)
    # A compiled division is good to 2 units.
    return _with_sign_of(tl.where(u > 1.0, 1.0, u), y)


@triton.jit
def sign_of(n):
    """The sign; 0 below the smallest normal number, and NaN stays."""
    size = tl.abs(n)
    hard = tl.where(size < 1.1754943508222875e-38, 0.0, 1.0)
    return _with_sign_of(tl.where(size != size, size, hard), n)


@triton.jit
def _with_sign_of(size, x):
    bits = size.to(tl.uint32, bitcast=True) | (x.to(tl.uint32, bitcast=True) & 0x80000000)
    return bits.to(tl.float32, bitcast=True)
