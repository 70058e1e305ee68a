"""The denominator of S3 in Triton: both p-th roots from a first guess on the bits and one high-order iteration."""

import triton
import triton.language as tl


@triton.jit
def next_root_and_inverse(r, a, beta2, one_minus_beta2, p, inverse_p, FORM: tl.constexpr, NESTEROV: tl.constexpr):
    """Return the new r and 1/b; where b is zero or subnormal 1/b exceeds 2^126 (or is 0: general p, b = 0).

    Both powers are taken of numbers divided by a power of two near ``max(r, a)`` (by the maximum itself for a general
    p), so that they stay in range and one of them is at least 1.
    """
    # Without memory a^p underflows beside the r of one larger gradient.
    r = tl.where(beta2 > 0, r, 0.0)
    largest = tl.maximum(r, a)
    if FORM == 0:
        whole = tl.maximum(largest, 1.1754943508222875e-38)
        part = 1.0 / whole
        tr = _power(r / whole, p)
        ta = _power(a / whole, p)
    else:
        exponent = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 0x00800000)
        whole = exponent.to(tl.float32, bitcast=True)
        part = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
        tr = _small_power(r * part, FORM)
        ta = _small_power(a * part, FORM)
    pa = one_minus_beta2 * ta
    q = beta2 * tr + pa
    c = q
    if NESTEROV:
        c = beta2 * q + pa
    return _root(q, inverse_p, FORM) * whole, _inverse_root(c, inverse_p, FORM) * part


@triton.jit
def _power(t, exponent):
    """``t ** exponent`` for t >= 0 and a run-time exponent; 0 stays 0, whatever the exponent's sign."""
    return tl.where(t > 0, tl.exp2(exponent * tl.log2(tl.where(t > 0, t, 1.0))), 0.0)


@triton.jit
def _small_power(t, FORM: tl.constexpr):
    if FORM == 1:
        return t
    elif FORM == 2:
        return t * t
    elif FORM == 15:
        return t * tl.sqrt(t)
    else:
        return t * t * t


@triton.jit
def _guess(v, FORM: tl.constexpr):
    """Return y near ``v ** (-1/FORM)``, ``z = v * y^(FORM-1)`` near the root, and the error ``h = 1 - z*y``.

    FORM 15, p = 3/2, takes the cube root's: both its roots, v^(2/3) and v^(-2/3), are made of y.

    The exponent is divided on the bits: an integer division by 3 is slow, a float multiplication is not.
    """
    bits = v.to(tl.int32, bitcast=True)
    if FORM == 2:
        y = (0x5F374686 - (bits >> 1)).to(tl.float32, bitcast=True)
        z = v * y
    else:
        third = (bits.to(tl.float32) * 0.3333333333333333).to(tl.int32)
        y = (0x54A1F52A - third).to(tl.float32, bitcast=True)
        z = v * (y * y)
    return y, z, tl.fma(-z, y, 1.0)


@triton.jit
def _root(v, inverse_p, FORM: tl.constexpr):
    """The FORM-th root: minimax polynomials of ``(1-h)^(-1 + 1/FORM)`` and the like over the guess's errors."""
    if FORM == 0:
        return _power(v, inverse_p)
    elif FORM == 1:
        return v
    else:
        y, z, h = _guess(v, FORM)
        if FORM == 2:
            return tl.fma(z * h, _polynomial2(h), z)
        elif FORM == 15:
            return _times_minus_third(v * y, h)
        return _times_minus_two_thirds(z, h)


@triton.jit
def _inverse_root(v, inverse_p, FORM: tl.constexpr):
    if FORM == 0:
        return _power(v, -inverse_p)
    elif FORM == 1:
        return 1.0 / v
    else:
        y, _, h = _guess(v, FORM)
        if FORM == 2:
            return tl.fma(y * h, _polynomial2(h), y)
        elif FORM == 15:
            return _times_minus_two_thirds(y * y, h)
        return _times_minus_third(y, h)


@triton.jit
def _times_minus_third(x, h):
    """``x * (1-h) ** (-1/3)``."""
    q = tl.fma(h, 0.14578986167907715, 0.1744770109653473)
    q = tl.fma(h, q, 0.22221580147743225)
    return tl.fma(x * h, tl.fma(h, q, 0.33332908153533936), x)


@triton.jit
def _times_minus_two_thirds(x, h):
    """``x * (1-h) ** (-2/3)``."""
    q = tl.fma(h, 0.4287402927875519, 0.4585475027561188)
    q = tl.fma(h, q, 0.4938008785247803)
    q = tl.fma(h, q, 0.5555365085601807)
    return tl.fma(x * h, tl.fma(h, q, 0.6666666865348816), x)


@triton.jit
def _polynomial2(h):
    q = tl.fma(h, 0.27495068311691284, 0.3139369785785675)
    q = tl.fma(h, q, 0.37499770522117615)
    return tl.fma(h, q, 0.4999983310699463)
