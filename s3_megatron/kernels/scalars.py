"""What a step takes beside the lists: numbers in tensors, and five sums to add to."""

import torch
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.watch.statistics import FIELDS


def check(weight: Tensor, statistics: Tensor | None, **numbers: Tensor | None) -> None:
    """Raise unless every number is one element where a kernel can read it; reads no value.

    Args:
        weight: one of the call's weights, for its device.
        statistics: None, or five contiguous float64 on the weight's device.
        numbers: by name; ``lr`` may be on the CPU, the others must be on the weight's device.

    Raises:
        S3Error: the name, and what it must be.
    """
    for name, x in numbers.items():
        if x is None:
            continue
        if x.numel() != 1:
            raise S3Error(f"{name} is a tensor of {x.numel()} elements: it must be one number")
        if x.device != weight.device and not (name == "lr" and x.device.type == "cpu"):
            raise S3Error(f"{name} is on {x.device} and the weights on {weight.device}: move it there")
        if x.is_complex():
            raise S3Error(f"{name} is {x.dtype}: it must be a real number")
    if statistics is None:
        return
    fits = statistics.shape == (len(FIELDS),) and statistics.dtype == torch.float64 and statistics.is_contiguous()
    if not fits or statistics.device != weight.device:
        raise S3Error(
            f"statistics has shape {list(statistics.shape)} and {statistics.dtype} on {statistics.device}: it must be "
            f"{len(FIELDS)} contiguous float64 on {weight.device}"
        )
