"""The updates as one Triton kernel over any number of tensors, for CUDA and ROCm."""

import importlib.util
import os

import torch

from s3_megatron.kernels.call import AnyRule, Columns, Step
from s3_megatron.kernels.metadata import Memory


def unavailable() -> str | None:
    """Return None if the Triton kernel can run here, else the reason, for people."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":  # Triton's interpreter runs it on the CPU, for tests
        return None
    if not torch.cuda.is_available():
        return "no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "this GPU is older than compute capability 8.0, the least Triton supports"
    return None


def step_(columns: Columns, rule: AnyRule, step: Step, memory: Memory | None = None) -> None:
    """Move every parameter by one step in one pass over memory and at most two launches.

    Nothing synchronises with the host. A call with the addresses of an earlier one allocates and copies nothing, and
    can then be captured in a CUDA graph, which must not outlive the tensors.

    For arguments and effects see ``kernels.call``. All tensors are on one device, in float32, bfloat16 or float16, of
    one dtype a list, the states in float32 or bfloat16; a row has 0 to over 2^31 elements. ``memory`` is what
    ``rows.read`` returned of these columns just now.

    Raises:
        S3Error: a CUDA graph captures a call with these tensors before any such call has run; the lists do not belong
            together, or a tensor's memory is not its value. Nothing has been written.
    """
    # Triton takes a second to import.
    from s3_megatron.kernels.triton import launch

    launch.step_(columns, rule, step, memory)
