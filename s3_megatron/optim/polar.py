"""SoftMuon's map of one matrix, by the polar iteration of emerging-optimizers; and how it is to be computed."""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.machine import is_first_rank
from s3_megatron.optim.tensor_parallel import Cut

logger = logging.getLogger(__name__)

Precision = Literal["medium", "highest"]  # bfloat16 and float32, by torch's names for products of float32 matrices

# The polar_express coefficients reach 1 from 1e-3 in 8 steps; each further step multiplies what is small by 1.875.
SHORTEST, LONGEST = 8, 20
REACH, GROWTH = 1e3, 1.875

# Up to here, times the largest singular value, bfloat16 stays within 2e-2 of the map.
COARSE = 8.0

# How much matrices may grow after the first soft step, at which they are measured, until bounds loosen.
MARGIN = 4.0


def library() -> tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., float]]:
    """Return newton_schulz, newton_schulz_tp and get_muon_scale_factor of emerging-optimizers.

    Logs once that another version than the one SoftMuon was run with is installed.

    Raises:
        S3Error: the package is missing, or lacks them.
    """
    try:
        from emerging_optimizers.orthogonalized_optimizers.muon import get_muon_scale_factor
        from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz, newton_schulz_tp
    except ImportError as error:
        raise S3Error(
            f"SoftMuon needs emerging-optimizers 0.3 ({error}): pip install 's3-megatron[softmuon]', or "
            "pip install emerging-optimizers==0.3.0"
        ) from error
    _look_at_version()
    return newton_schulz, newton_schulz_tp, get_muon_scale_factor


@functools.cache
def _look_at_version() -> None:
    try:
        found = metadata.version("emerging-optimizers")
    except metadata.PackageNotFoundError:  # a checkout has none
        found = "of an unknown version"
    if not found.startswith("0.3.") and is_first_rank():
        logger.warning(
            "emerging-optimizers %s was never run with SoftMuon, whose steps it computes: pip install "
            "emerging-optimizers==0.3.0 if they fail",
            found,
        )


def plan(tau: float, norm: float, largest: float) -> tuple[int, Precision]:
    """Return how many steps of the iteration ``soft_polar`` takes, and in which precision.

    It uses numbers of the host alone, so it costs no synchronisation.

    Args:
        tau: the step's temperature.
        norm: the largest Frobenius norm of the matrices when they were measured, which bounds how small a singular
            value of [M; I/tau] the iteration starts from: 1/(tau*norm).
        largest: their largest singular value.
    """
    beyond = max(MARGIN * tau * norm / REACH, 1.0)
    steps = SHORTEST + math.ceil(min(math.log(beyond) / math.log(GROWTH), LONGEST - SHORTEST))
    return steps, "medium" if tau * largest <= COARSE else "highest"


def soft_polar(
    matrix: Tensor,
    tau: float,
    steps: int = LONGEST,
    precision: Precision = "highest",
    cut: Cut | None = None,
    largest: Tensor | None = None,
) -> Tensor:
    """Return M (M^T M + tau^-2 I)^(-1/2): every singular value s becomes tau*s / sqrt(1 + (tau*s)^2).

    It is the top block of the polar factor of [M; I/tau], so the iteration that Muon uses computes it, and a matrix
    may have any rank. ``docs/softmuon.md`` has what it is bounded by.

    Args:
        matrix: float32 [rows, cols], or a stack [n, rows, cols]; an entry that is not finite makes every one NaN.
            With ``cut`` this rank's part of [rows, cols].
        tau: the temperature, > 0; the inverse of the size at which singular values stop counting as large.
        steps: of the iteration, each of three products.
        precision: "highest" computes them in float32, "medium" in bfloat16.
        cut: the ranks that share the matrix, all of which come here.
        largest: the size of its largest entry, [1, 1] or [n, 1, 1], where that is known.

    Returns:
        A new float32 tensor of the same shape.

    Raises:
        S3Error: tau is out of range.
    """
    if not 0 < tau < math.inf:
        raise S3Error(f"tau is {tau}: it must be a finite number > 0; the limit of a large tau is Muon's own step")
    is_turned = matrix.size(-2) < matrix.size(-1) if cut is None else cut.dim == 1
    if is_turned:
        return soft_polar(matrix.mT, tau, steps, precision, cut and replace(cut, dim=0), largest).mT
    # The map depends on tau*M alone. Entries of 1 at most keep the iteration clear of its eps and of float32's ends.
    size = (_largest(matrix, cut) if largest is None else largest).clamp_min(1 / tau)
    unit = torch.eye(matrix.size(-1), dtype=matrix.dtype, device=matrix.device) * (1 / tau / size)
    if cut is not None:  # the rows of a stack may be shared out in any way
        unit = unit.tensor_split(cut.group.size())[cut.mine]
    stacked = torch.cat([matrix / size, unit.expand(*matrix.shape[:-2], -1, -1)], dim=-2)
    return _iterate(stacked, steps, "polar_express", precision, cut)[..., : matrix.size(-2), :]


def direction(
    matrix: Tensor,
    soft: tuple[float, int, Precision] | None,
    group: dict[str, Any],
    qkv: Sequence[int] | None,
    cut: Cut | None = None,
) -> Tensor:
    """Return the update of a matrix or stack in units of the learning rate: mapped, and scaled.

    Args:
        matrix: float32 [rows, cols] or [n, rows, cols]; with ``cut`` this rank's part of [rows, cols].
        soft: temperature, steps and precision of ``soft_polar``; None is a hard step.
        group: a param group of SoftMuon's.
        qkv: as ``pieces`` takes it.
        cut: the ranks that share the matrix, and map it together.

    Returns:
        The same shape; a matrix with an entry that is not finite, on whichever rank, is NaN everywhere.
    """
    *_, scale_factor = library()
    parts, mapped = pieces(matrix, qkv), []
    # Passes over a matrix cost a CPU time beside the products: what is known of its entries is kept.
    sizes = [_largest(piece, cut) for piece in parts]
    is_bad = functools.reduce(torch.maximum, sizes) == math.inf
    for piece, size in zip(parts, sizes, strict=True):
        if soft is None:
            road = group["num_ns_steps"], group["coefficient_type"], group["fp32_matmul_prec"]
            update = polar(piece, *road, cut, size)
        else:
            update = soft_polar(piece, *soft, cut, size)
        shape = [*piece.shape[-2:]]
        if cut is not None:
            shape[cut.dim] *= cut.group.size()
        scale = scale_factor(*shape, mode=group["scale_mode"]) * group["extra_scale_factor"]
        mapped.append(update * torch.full_like(size, scale).masked_fill(is_bad, math.nan))
    return joined(mapped, qkv)


def polar(
    matrix: Tensor,
    steps: int,
    coefficients: str,
    precision: Precision,
    cut: Cut | None = None,
    largest: Tensor | None = None,
) -> Tensor:
    """Return what ``steps`` of the iteration make of a float32 matrix or stack: near its polar factor.

    With ``cut`` the matrix is this rank's part; ``largest`` is as ``soft_polar`` takes it.
    """
    size = _largest(matrix, cut) if largest is None else largest
    # The iteration takes norms below 1e-7 for that; a power of 2 changes nothing else.
    exponent = torch.frexp(size).exponent.clamp(-125, 125)
    # Of a whole matrix ldexp takes 30 times as long as its product with a number (torch 2.13, on a CPU).
    return _iterate(matrix * torch.ldexp(torch.ones_like(size), -exponent), steps, coefficients, precision, cut)


def _iterate(matrix: Tensor, steps: int, coefficients: str, precision: Precision, cut: Cut | None) -> Tensor:
    """Take the iteration's steps.

    Whatever precision of products the process has chosen, autocast too, is left out of it and is as before afterwards.
    """
    newton_schulz, newton_schulz_tp, _ = library()
    with torch.autocast(matrix.device.type, enabled=False), _products(precision):
        if cut is None:
            return newton_schulz(matrix, steps, coefficients)
        return newton_schulz_tp(matrix, steps, coefficients, cut.group, cut.dim, "distributed")


def _largest(matrix: Tensor, cut: Cut | None) -> Tensor:
    """Return the largest entry's size, of each matrix of a stack; infinity where one is not finite."""
    # A maximum over ranks may pass over NaN.
    largest = matrix.abs().amax((-2, -1), keepdim=True).nan_to_num(math.inf, math.inf)
    return largest if cut is None else cut.largest(largest)


def pieces(matrix: Tensor, qkv: Sequence[int] | None) -> list[Tensor]:
    """Return the matrices that are mapped each on its own: all of it, or of a fused QKV weight Q, K and V.

    Args:
        matrix: [rows, cols]; with ``qkv`` its rows are a head group's Q, K and V, then the next group's.
        qkv: rows of a group's Q, K and V (and of a gate, where there is one); they add up to a divisor of rows.
    """
    if qkv is None:
        return [matrix]
    groups = matrix.view(-1, sum(qkv), matrix.size(-1))
    return [part.reshape(-1, matrix.size(-1)) for part in groups.split(list(qkv), dim=1)]


def joined(parts: list[Tensor], qkv: Sequence[int] | None) -> Tensor:
    """Undo ``pieces``."""
    if qkv is None:
        return parts[0]
    cols = parts[0].size(-1)
    return torch.cat([part.view(-1, rows, cols) for part, rows in zip(parts, qkv, strict=True)], 1).view(-1, cols)


@contextmanager
def _products(precision: Precision) -> Iterator[None]:
    """Set what newton_schulz looks at.

    torch's getter raises where a program has used the newer ``fp32_precision`` settings, so these are kept by hand.
    """
    backends = (getattr(torch.backends, name) for name in ("cuda", "mkldnn"))
    newer = [x.matmul for x in backends if hasattr(getattr(x, "matmul", None), "fp32_precision")]
    chosen = [x.fp32_precision for x in newer]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        before = None
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)
        for where, value in zip(newer, chosen, strict=True):
            where.fp32_precision = value
