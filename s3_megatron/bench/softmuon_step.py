"""The time of one step of SoftMuon on the matrices of GPT's layers: torch's Muon and Megatron's in the same run.

Megatron's Muon is emerging-optimizers' own class, of which megatron-core 0.19 makes a tensor-parallel one. Contenders
take turns in one process; in a round each takes one step. Medians. The soft phase is met at its first step and at
shares of its way: temperatures follow from the momentum of Gaussian gradients.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import nn

from s3_megatron.bench import timing
from s3_megatron.bench.about import about
from s3_megatron.bench.timing import WARM_UP, Times
from s3_megatron.errors import S3Error
from s3_megatron.optim import SoftMuon

TORCH = "Muon, torch"
# Soft steps of a run of that many; the first is the longest.
SOFT_STEPS = 1000
SHARES = (0.0, 0.1, 0.5, 0.999)


@dataclass(frozen=True)
class Contender:
    """An optimizer by name, how it is built, and, of a soft step, which one of the soft phase it is."""

    name: str
    make: Callable[..., torch.optim.Optimizer]
    step: int | None = None


def contenders() -> list[Contender]:
    """List what is compared: 5 steps of the iteration in bfloat16 for each of the hard ones."""
    from emerging_optimizers.orthogonalized_optimizers import Muon

    rates: dict[str, Any] = {"lr": 3e-4, "weight_decay": 0.1}
    hard: partial[SoftMuon] = partial(SoftMuon, **rates, soft_start=1)
    soft: partial[SoftMuon] = partial(SoftMuon, **rates, sign_iters=0, transition_iters=SOFT_STEPS)
    found = [
        Contender(TORCH, partial(torch.optim.Muon, **rates, adjust_lr_fn="match_rms_adamw")),
        Contender("Muon, Megatron's", partial(Muon, **rates, momentum=0.95, nesterov=True, extra_scale_factor=0.2)),
        Contender("SoftMuon, hard", hard),
        Contender("SoftMuon, hard, float32", partial(hard, fp32_matmul_prec="highest")),
    ]
    for share in SHARES:
        name = "first step" if share == 0 else f"{share:.1%} of the way"
        found.append(Contender(f"SoftMuon, soft, {name}", soft, int(share * SOFT_STEPS)))
    return found


def weights(width: int, layers: int, device: str) -> list[nn.Parameter]:
    """Make the matrices of a GPT's layers, with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * layers
    made = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    for weight in made:
        weight.grad = (torch.randn(weight.shape, generator=generator) * 1e-3).to(device)
    return made


def measure(width: int, layers: int, rounds: int, device: str) -> dict[str, Any]:
    """Measure; returns a row for each contender, and what they were measured on.

    Raises:
        S3Error: ``device`` is not cpu, nor a GPU that is here.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise S3Error(f"--device is {device}: it must be cpu, or cuda where torch sees a GPU")
    params, racing = weights(width, layers, device), []
    for one in contenders():
        optimizer = one.make(params)
        optimizer.step()  # allocates; and of a soft phase the first step, behind which it is measured
        racing.append((one, optimizer))
    times: dict[str, list[Times]] = {one.name: [] for one, _ in racing}
    for _ in range(WARM_UP + rounds):
        for one, optimizer in racing:
            if one.step is not None:
                assert isinstance(optimizer, SoftMuon)
                optimizer.write_to_groups(steps_taken=one.step)
            times[one.name].append(timing.once(optimizer.step, device))
    medians = {name: timing.median(taken[WARM_UP:]) for name, taken in times.items()}
    rows = []
    for one, optimizer in racing:
        row = {"name": one.name, "plan": _plan(one, optimizer), "ms": medians[one.name].whole * 1e3}
        rows.append({**row, "ratio": medians[one.name].whole / medians[TORCH].whole})
    sizes = {"width": width, "layers": layers, "parameters": sum(weight.numel() for weight in params)}
    return {**about(device, "emerging-optimizers"), **sizes, "rounds": rounds, "rows": rows}


def _plan(one: Contender, optimizer: torch.optim.Optimizer) -> str:
    """Say how many steps of the iteration it takes, and in which precision."""
    if not isinstance(optimizer, SoftMuon):
        return "5, medium"
    group = optimizer.param_groups[0]
    if one.step is None:
        return f"{group['num_ns_steps']}, {group['fp32_matmul_prec']}"
    optimizer.write_to_groups(steps_taken=one.step)
    assert optimizer.tau < math.inf
    return "{}, {}".format(*optimizer.plan(group, optimizer.tau))


def tables(measured: dict[str, Any]) -> Iterator[Table]:
    """Lay out the rows."""
    table = Table(
        title=f"A step of {measured['parameters']:,} weights in {4 * measured['layers']} matrices, "
        f"{measured['processor']}, {measured['threads']} threads",
        title_justify="left",
        caption="plan: steps of the iteration, three products each; medium: in bfloat16, highest: in float32",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for heading in ("plan", "ms", "x Muon"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in measured["rows"]:
        table.add_row(row["name"], row["plan"], f"{row['ms']:.1f}", f"{row['ratio']:.2f}")
    yield table
