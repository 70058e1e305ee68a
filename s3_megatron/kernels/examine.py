"""What belongs together and can be written: lists of tensors are examined before the first write, one by one."""

import functools

import torch
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.kernels.call import ROLES, STATES, Columns
from s3_megatron.kernels.formats import PLAIN, find


def examine(columns: Columns) -> None:
    """Raise if the lists do not belong together, or a tensor cannot be written; reads no value.

    Raises:
        S3Error: lists of several lengths; a row of several shapes or devices; sparse, complex, integer tensors; states
            of two dtypes; tensors longer than their storage; written ones with several elements in one place.
    """
    same_lengths(columns)
    for row in columns.rows():
        weight = row[0]
        for name, x in zip(columns.lists, row, strict=True):
            if x.layout is not torch.strided:
                raise S3Error(
                    f"the step takes dense tensors, and a {name} of shape {list(x.shape)} is {x.layout}: build the "
                    "embedding with sparse=False"
                )
            if x.shape != weight.shape:
                raise S3Error(
                    f"a weight of shape {list(weight.shape)} has a {name} of shape {list(x.shape)}: they must be equal"
                )
            if x.device != weight.device:
                raise S3Error(f"a weight on {weight.device} has a {name} on {x.device}: they must be on one device")
            if name not in STATES and not x.is_floating_point():
                raise S3Error(f"the step takes real floating-point tensors, and a {name} is {x.dtype}")
            if exceeds_its_storage(x):
                raise S3Error(f"a {name} of shape {list(x.shape)} is longer than its storage, which was resized")
            if ROLES[name] != "in" and _meets_itself(x):
                raise S3Error(
                    f"a {name} of shape {list(x.shape)} and strides {list(x.stride())} has several elements in one "
                    "place in memory and cannot be written: clone() it"
                )
        states = {name: x.dtype for name, x in zip(columns.lists, row, strict=True) if name in STATES}
        if find(columns.format, [*states.values()]) is None:
            found = " and ".join(f"{name} is {dtype}" for name, dtype in states.items())
            raise S3Error(f"{found}: they must have one dtype, {', '.join(each.name for each in PLAIN.values())}")


def same_lengths(columns: Columns) -> None:
    """Raise S3Error unless the lists are of one length."""
    lengths = [*map(len, columns.lists.values())]
    if lengths.count(lengths[0]) != len(lengths):
        shown = ", ".join(f"{count} of kind {name}" for count, name in zip(lengths, columns.lists, strict=True))
        raise S3Error(f"the step takes lists of one length, and got {shown}")


@functools.cache
def is_memory(kind: type[Tensor]) -> bool:
    """Whether tensors of this class are their memory: no class of its own decides what an operation does."""
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    usual = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)  # type: ignore[attr-defined]
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__ and function in usual


def exceeds_its_storage(x: Tensor) -> bool:
    """Whether a tensor's last element lies behind its storage's end."""
    if not x.numel() or x.is_meta or not is_memory(type(x)) or torch._C._functorch.maybe_current_level() is not None:
        return False
    last = x.storage_offset() + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size() > x.untyped_storage().nbytes()


def _meets_itself(x: Tensor) -> bool:
    """Whether two elements of a tensor are one in memory."""
    if x.is_contiguous() or x.numel() < 2:
        return False
    # By rising stride, each must step over all that the smaller ones reach.
    reach = 1
    dims = sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    for stride, size in dims:
        if stride < reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    if dims[0][0] == 0:
        return True
    places = torch.zeros((), dtype=torch.int64)
    for stride, size in dims:
        places = places[..., None] + torch.arange(size) * stride
    return places.unique().numel() < x.numel()
