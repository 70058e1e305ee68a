"""Median and median absolute deviation of tensors that lie on several ranks, exact whatever the number of ranks."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# What is compared: a float's bits as a signed integer that rises with the float.
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
_DIGIT = 16  # bits of a key that one pass over the data finds
_BINS = 1 << _DIGIT
_AT_ONCE = 1 << 22  # elements, for the copies that a pass makes

type Chunks = Callable[[], Iterator[Tensor]]


def median_and_deviation(parts: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> tuple[float, float]:
    """Return mu, the median of all elements, and sigma, the median of |element - mu|; (0, 0) where there is none.

    Of an even number of elements it is the lower of the two in the middle, as ``torch.median`` has it; -0 equals 0.
    Only integers are added up over the ranks, so the bits of the result do not depend on how elements are shared out.
    A multiset that every rank holds as a whole has the same result as one of them.

    The difference is rounded to float32, or to float64 if a rank has a float64 part. Waits for the device.

    Args:
        parts: this rank's own tensors, of any shape, float16, bfloat16, float32 or float64; none is modified.
        group: the ranks that share the elements, each of which calls this; None: this process alone.
    """
    elements = sum(part.numel() for part in parts)
    wide = any(part.dtype == torch.float64 for part in parts)
    elements, wide_ranks = _summed(torch.tensor([elements, wide]), group).tolist()
    if elements == 0:
        return 0.0, 0.0
    dtype = torch.float64 if wide_ranks else torch.float32
    flat = [part.detach().reshape(-1) for part in parts]

    def values() -> Iterator[Tensor]:
        return (chunk.to(dtype) for part in flat for chunk in part.split(_AT_ONCE))

    mu = _median(values, elements, dtype, group)
    return mu, _median(lambda: ((x - mu).abs() for x in values()), elements, dtype, group)


def _median(values: Chunks, elements: int, dtype: torch.dtype, group: dist.ProcessGroup | None) -> float:
    """Find the element number (elements - 1) // 2 in rising order, digit by digit of its key."""
    bits = torch.finfo(dtype).bits
    wanted, key = (elements - 1) // 2, 0
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        is_first = shift == bits - _DIGIT
        counts = torch.zeros(_BINS, dtype=torch.int64)
        for chunk in values():
            keys = _keys(chunk)
            if not is_first:
                keys = keys[keys >> (shift + _DIGIT) == key]
            # The first digit has the sign.
            digits = (keys >> shift) + _BINS // 2 if is_first else (keys >> shift) & (_BINS - 1)
            counts += torch.bincount(digits, minlength=_BINS).cpu()
        up_to = _summed(counts, group).cumsum(0)
        digit = int(torch.searchsorted(up_to, wanted, right=True))
        wanted -= int(up_to[digit - 1]) if digit else 0
        key = digit - _BINS // 2 if is_first else key << _DIGIT | digit
    return _value(key, dtype)


def _keys(x: Tensor) -> Tensor:
    """Return integers that compare as floats do; NaN lies beyond infinity."""
    # Adding 0 makes -0 of 0.
    return _fold((x + 0.0).view(_INTEGERS[x.dtype]))


def _value(key: int, dtype: torch.dtype) -> float:
    return _fold(torch.tensor([key], dtype=_INTEGERS[dtype])).view(dtype).item()


def _fold(bits: Tensor) -> Tensor:
    """Turn the order of the negative ones around; twice is as before."""
    info = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


def _summed(counts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Add up an int64 tensor over ranks; on the CPU."""
    if group is None:
        return counts
    # By its devices: a group that was made without a backend has one for each, and none by name.
    on_host = "cpu:" in dist.get_backend_config(group)
    counts = counts.to("cpu" if on_host else torch.accelerator.current_accelerator())
    dist.all_reduce(counts, group=group)
    return counts.cpu()
