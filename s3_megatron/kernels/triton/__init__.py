"""The S3 update as one Triton kernel over any number of tensors, for CUDA and ROCm."""

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from s3_megatron.kernels.examine import Columns
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


def s3_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_roots: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    p: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool = False,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    model_params: Sequence[Tensor] = (),
    statistics: Tensor | None = None,
    rounding_seed: Tensor | None = None,
    memory: Memory | None = None,
) -> None:
    """Move every parameter by one S3 step in one pass over memory and at most two launches.

    Nothing synchronises with the host. A call with the addresses of an earlier one allocates and copies nothing, and
    can then be captured in a CUDA graph, which must not outlive the tensors.

    Args:
        params: weights, float32, bfloat16 or float16, all on one device (modified in place). As in every list, all
            of one dtype, and row i of each list has the same number of elements, 0 to over 2^31.
        grads: gradients, one of the same dtypes; never modified.
        exp_avgs: m, float32 or bfloat16 (modified in place).
        exp_avg_roots: r, dtype of m (modified in place).
        lr: learning rate, a number or 0-dim; on the CPU it is read as a number, on the device by the kernel.
        beta1: decay of m, in [0, 1).
        beta2: decay of s, in [0, 1). If it equals beta1 the update is clamped to [-1, 1].
        p: exponent of the denominator, >= 1.
        weight_decay: decoupled, ``x <- x - lr * (update + weight_decay * x)``.
        nesterov: look ahead by one step, as Algorithm 1 does.
        maximize: ascend instead of descending.
        scale: float32, one element: every gradient is multiplied by it first.
        found_inf: float32, one element: not zero turns the step into a no-op.
        model_params: empty, or one tensor a row to which the new weight is written too (modified in place).
        statistics: ``watch.statistics.zeros``, to which this call adds its own (modified in place); a broken gradient
            counts as u = 0.
        rounding_seed: int64, one element: bfloat16 m and r are rounded stochastically with it, not to nearest even.
        memory: what ``rows.read`` returned of these lists just now.

    Raises:
        S3Error: a CUDA graph captures a call with these tensors before any such call has run; the lists do not belong
            together, or a tensor's memory is not its value. Nothing has been written.
    """
    # Triton takes a second to import.
    from s3_megatron.kernels.triton.launch import form, step_

    pointer = lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else None
    hyperparameters = {
        "lr": float(lr) if pointer is None else 0.0,
        "lr_pointer": pointer,
        "sign": -1.0 if maximize else 1.0,
        "beta1": float(beta1),
        "one_minus_beta1": 1.0 - beta1,
        "beta2": float(beta2),
        "one_minus_beta2": 1.0 - beta2,
        "p": float(p),
        "inverse_p": 1.0 / p,
        # |n/b| < 1 in exact arithmetic; float32 rounding reaches 1 + 1.1e-6.
        "bound": 1.0 if beta1 == beta2 else float("inf"),
        "weight_decay": float(weight_decay),
        "scale": scale,
        "found_inf": found_inf,
        "statistics": statistics,
        "rounding_seed": rounding_seed,
        "FORM": form(p),
        "NESTEROV": nesterov,
    }
    columns: Columns = [params, grads, exp_avgs, exp_avg_roots, *([model_params] if model_params else [])]
    step_(columns, hyperparameters, memory)
