"""The update of many tensors in one Triton kernel: every program moves one block of one row.

Everything that changes from step to step is a run-time value. Compiled apart are only the form (S3's, whose p is 1, 2,
3 or another; SoftSignum's, soft or hard), Nesterov, dtypes, alignment and which optional pointers are given.
"""

import triton
import triton.language as tl

from s3_megatron.kernels.call import ROLES
from s3_megatron.kernels.triton.roots import next_root_and_inverse
from s3_megatron.kernels.triton.soft_signs import average, sign_of, tanh_of
from s3_megatron.watch import statistics as order

# Where each of the sums is.
SUM, LARGEST, SATURATED, AGREEING, ELEMENTS = (tl.constexpr(order.FIELDS.index(name)) for name in order.FIELDS)
# Forms beside S3's (call.form): SoftSignum's steps, by tanh and by sign.
SOFT, HARD = tl.constexpr(-1), tl.constexpr(-2)
# Columns of the row table, int64: an address for each kind of tensor, and the number of elements.
COLUMNS = tl.constexpr(len(ROLES) + 1)
# Eight elements a thread: one 128-bit access for 2-byte types, two for float32, so some 100 bytes a thread are under
# way at once where the loads stay together: ptxas, left alone, moves all but two of eight behind arithmetic, to save
# registers (sass.py, and tests/kernels/triton/test_compiled.py). No autotune: nothing but memory binds here, and a
# tuner would run the update several times over.
BLOCK = 1024
ELEMENTS_PER_THREAD = 8

RUN_TIME = [
    "work",
    "rows",
    "lr",
    "lr_pointer",
    "sign",
    "beta1",
    "one_minus_beta1",
    "beta2",
    "one_minus_beta2",
    "p",
    "inverse_p",
    "bound",
    "tau",
    "weight_decay",
    "factor",
    "found_inf",
    "statistics",
    "seed",
]


@triton.jit
def load_states(exp_avg, exp_avg_root, mask, TOGETHER: tl.constexpr):
    """Read m and r as float32: with ``store_states`` the only place that knows the state's format.

    Without a root there is no r, and what stands for it is m.
    """
    m = tl.load(exp_avg, mask=mask, other=0.0, volatile=TOGETHER).to(tl.float32)
    if exp_avg_root is None:
        return m, m
    else:
        return m, tl.load(exp_avg_root, mask=mask, other=0.0, volatile=TOGETHER).to(tl.float32)


@triton.jit
def store_states(exp_avg, exp_avg_root, m, r, mask, noise):
    """Write m and r, to nearest even, or where ``noise`` is given stochastically with 16 of its bits each."""
    if noise is None:
        low_m = m.to(exp_avg.dtype.element_ty)
    else:
        low_m = _round_stochastically(m, noise & 0xFFFF)
    tl.store(exp_avg, low_m, mask=mask)
    if exp_avg_root is not None:
        if noise is None:
            low_r = r.to(exp_avg_root.dtype.element_ty)
        else:
            low_r = _round_stochastically(r, noise >> 16)
        tl.store(exp_avg_root, low_r, mask=mask)


@triton.jit
def _round_stochastically(value, noise):
    """Round float32 to bfloat16 up or down, with the mean kept: what bfloat16 holds exactly stays."""
    bits = (value.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _mix(x):
    """Scramble 32 bits (the multipliers known as lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _noise(seed, row, chunk, lane):
    """32 bits for every element of a block: a hash of the seed, the row and the element's number in it."""
    key = _mix(_mix(seed.to(tl.uint32) + 0x9E3779B9) ^ (seed >> 32).to(tl.uint32))
    key = _mix(_mix(key ^ row.to(tl.uint32)) ^ chunk.to(tl.uint32))
    return _mix(_mix(lane.to(tl.uint32) ^ key) + key)


@triton.jit
def _pointers(address, start, lane, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A block of pointers from the first element's address."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start + lane


@triton.jit
def _accumulate(statistics, u, g, count):
    """Add ``watch.statistics`` of one block.

    Beyond its ``count`` elements the block loaded zeros, so u is 0 there.
    """
    size = tl.abs(u)
    some = count > 0
    tl.atomic_add(statistics + SUM, tl.sum(size).to(tl.float64), mask=some, sem="relaxed")
    # Not negative: their bits, as integers, are in the same order.
    largest = (statistics + LARGEST).to(tl.pointer_type(tl.int64), bitcast=True)
    tl.atomic_max(largest, tl.max(size).to(tl.float64).to(tl.int64, bitcast=True), mask=some, sem="relaxed")
    tl.atomic_add(statistics + SATURATED, tl.sum((size > 0.9).to(tl.int32)).to(tl.float64), mask=some, sem="relaxed")
    agree = tl.where(u > 0, tl.where(g > 0, 1, 0), tl.where(u < 0, tl.where(g < 0, 1, 0), 0))
    tl.atomic_add(statistics + AGREEING, tl.sum(agree).to(tl.float64), mask=some, sem="relaxed")
    tl.atomic_add(statistics + ELEMENTS, count.to(tl.float64), mask=some, sem="relaxed")


@triton.jit
def _next(  # its arguments are those of the kernel
    g,
    m,
    r,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    p,
    inverse_p,
    bound,
    FORM: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    """Return S3's new m and r, and its update."""
    ga = one_minus_beta1 * g
    m1 = beta1 * m + ga
    n = m1
    if NESTEROV:
        n = beta1 * m1 + ga
    r1, inverse_b = next_root_and_inverse(r, tl.abs(g), beta2, one_minus_beta2, p, inverse_p, FORM, NESTEROV)
    # b is zero or subnormal: m and r stop fading at a few units of the smallest denormal.
    u = tl.where(inverse_b > 8.507059173023462e37, 0.0, n * inverse_b)
    return m1, r1, tl.minimum(tl.maximum(u, -bound), bound)


@triton.jit(do_not_specialize=RUN_TIME)
def s3_step(
    work,  # int64 a program: row + 2^32 * block of the row
    rows,  # int64 [rows, COLUMNS]: addresses in the order of ROLES; elements
    lr,
    lr_pointer,  # None: lr is a number
    sign,  # -1 to maximize
    beta1,
    one_minus_beta1,  # 1 - beta1, rounded from float64
    beta2,
    one_minus_beta2,
    p,
    inverse_p,
    bound,  # of |u|: 1, or inf where the betas differ
    tau,
    weight_decay,
    factor,
    found_inf,
    statistics,
    seed,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    MODEL: tl.constexpr,  # None: no model weight to write
    FORM: tl.constexpr,  # p if it is 1, 2 or 3, 15 for 1.5, otherwise 0; SOFT or HARD: SoftSignum's, without r
    NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,  # 16-byte addresses and a multiple of 16 elements
    TOGETHER: tl.constexpr,  # keep the loads in front of the arithmetic: volatile, which ptxas does not move
    BLOCK: tl.constexpr,
):
    """Move one block by one step of S3 or SoftSignum, float32 inside."""
    item = tl.load(work + tl.program_id(0))
    row = item & 0xFFFFFFFF
    chunk = item >> 32
    entry = rows + row * COLUMNS
    elements = tl.load(entry + COLUMNS - 1)
    if ALIGNED:
        elements = tl.multiple_of(elements, 16)
    start = chunk * BLOCK
    lane = tl.arange(0, BLOCK)
    # The block's own count fits 32 bits; the row's does not.
    count = tl.minimum(elements - start, BLOCK).to(tl.int32)
    if found_inf is not None:
        count = tl.where(tl.load(found_inf) == 0, count, 0)
    mask = lane < count

    x_at = _pointers(tl.load(entry), start, lane, PARAM, ALIGNED)
    g_at = _pointers(tl.load(entry + 1), start, lane, GRAD, ALIGNED)
    m_at = _pointers(tl.load(entry + 2), start, lane, STATE, ALIGNED)
    r_at = None
    if FORM >= 0:
        r_at = _pointers(tl.load(entry + 3), start, lane, STATE, ALIGNED)
    x = tl.load(x_at, mask=mask, other=0.0, volatile=TOGETHER).to(tl.float32)
    g = tl.load(g_at, mask=mask, other=0.0, volatile=TOGETHER).to(tl.float32)
    m, r = load_states(m_at, r_at, mask, TOGETHER)

    if factor is not None:
        sign *= tl.load(factor)
    if lr_pointer is not None:
        lr = tl.load(lr_pointer).to(tl.float32)
    g *= sign
    # A quarter of the range, or g - m overflows; NaN compares false.
    ok = tl.abs(g) <= 8.507058665963221e37
    if FORM >= 0:
        m1, r1, u = _next(g, m, r, beta1, one_minus_beta1, beta2, one_minus_beta2, p, inverse_p, bound, FORM, NESTEROV)
    else:
        m1 = average(m, g, beta1, one_minus_beta1)
        r1 = m1
        n = average(m1, g, beta1, one_minus_beta1) if NESTEROV else m1
        u = tanh_of(tau * n) if FORM == SOFT else sign_of(n)
    x1 = x - lr * (u + weight_decay * x)

    # Broken gradients select the old value; multiplying by zero would write NaN.
    x1 = tl.where(ok, x1, x)
    m1 = tl.where(ok, m1, m)
    r1 = tl.where(ok, r1, r)
    tl.store(x_at, x1.to(PARAM), mask=mask)
    noise = None
    if seed is not None and STATE == tl.bfloat16:
        noise = _noise(tl.load(seed), row, chunk, lane)
    store_states(m_at, r_at, m1, r1, mask, noise)
    if MODEL is not None:
        model_at = _pointers(tl.load(entry + 4), start, lane, MODEL, ALIGNED)
        tl.store(model_at, x1.to(MODEL), mask=mask)
    if statistics is not None:
        _accumulate(statistics, tl.where(ok, u, 0.0), g, count)
