"""One small step by the Triton kernel: a GPU that torch sees may still not run what Triton compiles for it."""

import torch
from torch import Tensor

from s3_megatron.kernels import foreach
from s3_megatron.kernels.call import Columns, Kind, Rule, Step
from s3_megatron.kernels.triton import step_


def fault(device: str) -> str | None:
    """Launch a step of 1,000 weights on ``device`` and compare it with foreach's; None if all is well, else a line."""
    x, g = torch.linspace(-1, 1, 1000, device=device), torch.linspace(2, -1, 1000, device=device)
    r = torch.linspace(0.1, 3, 1000, device=device)
    row: dict[Kind, Tensor] = {"weight": x, "gradient": g, "m": r / 2, "r": r}
    ours, theirs = (Columns({kind: [tensor.clone()] for kind, tensor in row.items()}) for _ in range(2))
    rule = Rule(lr=torch.tensor(0.1), beta1=0.95, beta2=0.95, p=3.0, weight_decay=0.1, nesterov=True)
    try:
        step_(ours, rule, Step())
        foreach.s3_step_(theirs, rule, Step())
        worst = max(float((a - b).abs().max()) for a, b in zip(*ours.rows(), *theirs.rows(), strict=True))
    except Exception as error:  # the compiler's, the driver's or the launch's
        return f"a launch fails: {type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    # The same formula in float32: a few roundings of numbers up to 3.
    return None if worst < 1e-5 else f"a launch is off by {worst:.1g}"
