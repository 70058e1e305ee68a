"""One small step by the Triton kernel: a GPU that torch sees may still not run what Triton compiles for it."""

import torch

from s3_megatron.kernels import foreach
from s3_megatron.kernels.triton import s3_step_


def fault(device: str) -> str | None:
    """Launch a step of 1,000 weights on ``device`` and compare it with foreach's; None if all is well, else a line."""
    x, g = torch.linspace(-1, 1, 1000, device=device), torch.linspace(2, -1, 1000, device=device)
    r = torch.linspace(0.1, 3, 1000, device=device)
    columns = [[x, g, r / 2, r] for _ in range(2)]
    ours, theirs = ([[tensor.clone()] for tensor in column] for column in columns)
    settings = {"lr": torch.tensor(0.1), "beta1": 0.95, "beta2": 0.95, "p": 3.0, "weight_decay": 0.1, "nesterov": True}
    try:
        s3_step_(*ours, **settings)  # type: ignore[arg-type]
        foreach.s3_step_(*theirs, **settings)  # type: ignore[arg-type]
        worst = max(float((a[0] - b[0]).abs().max()) for a, b in zip(ours, theirs, strict=True))
    except Exception as error:  # the compiler's, the driver's or the launch's
        return f"a launch fails: {type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    # The same formula in float32: a few roundings of numbers up to 3.
    return None if worst < 1e-5 else f"a launch is off by {worst:.1g}"
