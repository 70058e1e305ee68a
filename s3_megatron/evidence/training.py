"""Training a stack of cells, and what is written down of each."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from s3_megatron.evidence import contenders, spikes, text, unfinished
from s3_megatron.evidence.cells import Cell, Result
from s3_megatron.evidence.experiments import Setup
from s3_megatron.evidence.stack import Stack
from s3_megatron.evidence.text import Text
from s3_megatron.evidence.unfinished import Kept

POINTS = 200  # of a thinned curve
VALIDATION_SEQUENCES = 64  # at once


def train(
    cells: Sequence[Cell],
    corpus: Text,
    device: str = "cpu",
    go_on: Callable[[int], bool] = lambda step: True,
    kept: Kept | None = None,
) -> list[Result] | None:
    """Train cells of one setup and optimizer as one stack; returns a result each, in their order.

    ``corpus`` is on ``device``. ``go_on`` is called with the number of every step before it is taken, and during the
    validation; if it returns False, None is returned, and the stack is ``kept``: called again, it goes on.
    """
    setup, began = cells[0].setup, time.monotonic()
    stack = Stack(setup.model, [cell.seed for cell in cells], device)
    orders = [text.order(corpus, cell.seed, setup.steps, setup.batch, setup.length) for cell in cells]
    starts = torch.stack(orders, dim=1).to(device)  # [steps, members, batch]
    weights = list(stack.weights.values())
    hashes = [
        {"weights": text.fingerprint(*(w[i] for w in weights)), "order": text.fingerprint(order)}
        for i, order in enumerate(orders)
    ]
    optimizers, views = _optimizers(stack, cells)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    rates = torch.tensor([cell.rate for cell in cells], device=device)
    losses = torch.zeros(setup.steps, len(cells), device=device)
    norms = torch.zeros_like(losses)
    updates: list[Tensor] = []  # each [2, members]: mean and max |u|
    own_schedule = contenders.CONTENDERS[cells[0].optimizer].own_schedule
    schedule = dataclasses.replace(setup, schedule="constant") if own_schedule else setup
    changing, first = [*weights, losses, norms], 0
    if kept and (was := unfinished.read(kept, device, optimizers, changing)):
        first, updates, began = was["step"], was["updates"], began - was["seconds"]

    def keep(step: int) -> None:
        if kept and step > first:
            seconds = time.monotonic() - began
            unfinished.write(kept, optimizers, changing, step=step, updates=updates, seconds=seconds)

    for step in range(first, setup.steps):
        if not go_on(step):
            keep(step)
            return None
        factor = schedule.rate_factor(step)
        tokens = text.windows(corpus.train, starts[step], setup.length + 1)
        loss = stack.losses(tokens, getattr(torch, setup.products))
        # As backward() leaves them: torch's fused AdamW takes a transposed gradient for another one (2.13, on CPUs).
        grads = [g.contiguous() for g in torch.autograd.grad(loss.sum(), weights)]
        losses[step], norms[step] = loss.detach(), clip_(grads, setup.clip)
        if step == setup.kick_step:
            torch._foreach_mul_(grads, setup.kick)
        for view, index, sliced in views:
            view.grad = grads[index][sliced]
        is_watched = step % setup.watch_every == 0
        before = [w.detach().clone() for w in weights] if is_watched else []
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks, strict=True):
            group["lr"] = factor * peak
        for optimizer in optimizers:
            optimizer.step()
        if is_watched:
            updates.append(_updates(before, weights, list(stack.weights), factor, rates, setup.decay))
    for optimizer in optimizers:
        if own_schedule:
            optimizer.eval()  # type: ignore[attr-defined]
    validation = validate(stack, corpus, setup, go_on)
    if validation is None:
        keep(setup.steps)
        return None
    seconds = (time.monotonic() - began) / len(cells)
    curves = torch.stack([losses, norms]).cpu()
    looks = torch.stack(updates).cpu()
    return [
        {
            **describe(cell),
            **hashes[i],
            "trained": text.fingerprint(*(w[i] for w in weights)),
            "validation": validation[i],
            "seconds": round(seconds, 2),
            "stack": len(cells),
            **_curve(curves[0, :, i].tolist(), setup),
            "norms": _thin(curves[1, :, i].tolist(), _every(setup)),
            "update_mean": _digits(looks[:, 0, i].tolist()),
            "update_max": _digits(looks[:, 1, i].tolist()),
        }
        for i, cell in enumerate(cells)
    ]


def describe(cell: Cell) -> Result:
    """Say which run it is."""
    return {
        "key": cell.key,
        "contender": cell.contender,
        "optimizer": cell.optimizer,
        "setup": cell.setup_name,
        "rate": cell.rate,
        "settings": json.loads(cell.settings),
        "seed": cell.seed,
    }


def clip_(grads: list[Tensor], limit: float) -> Tensor:
    """Scale each member's gradient to a norm of at most ``limit``, if it is not 0 (in place); returns the norms."""
    # Along the last dimension both times, where a sum's order does not depend on the number of members.
    norms = torch.stack([g.flatten(1).square().sum(1) for g in grads], dim=1).sum(1).sqrt()
    if limit:
        scale = (limit / (norms + 1e-6)).clamp(max=1.0)
        for g in grads:
            g.mul_(scale.view(-1, *[1] * (g.dim() - 1)))
    return norms


@torch.no_grad()
def validate(stack: Stack, corpus: Text, setup: Setup, go_on: Callable[[int], bool]) -> list[float] | None:
    """Return each member's mean loss over the validation bytes; None where ``go_on`` returns False before."""
    starts = text.validation_starts(corpus, setup.validation, setup.length + 1).to(corpus.validation.device)
    total = torch.zeros(stack.members, dtype=torch.float64, device=starts.device)
    for part in starts.split(VALIDATION_SEQUENCES):
        if not go_on(setup.steps):
            return None
        tokens = text.windows(corpus.validation, part, setup.length + 1)
        losses = stack.losses(tokens.expand(stack.members, -1, -1), getattr(torch, setup.products))
        total += losses.double() * len(part)
    return (total / len(starts)).tolist()


def _optimizers(
    stack: Stack, cells: Sequence[Cell]
) -> tuple[list[torch.optim.Optimizer], list[tuple[Tensor, int, slice | int]]]:
    """Build an optimizer for each configuration, or each member; and list what it moves, with where that lies."""
    optimizers: list[torch.optim.Optimizer] = []
    views: list[tuple[Tensor, int, slice | int]] = []
    first = 0
    while first < len(cells):
        cell, last = cells[first], first + 1
        while last < len(cells) and cells[last].configuration == cell.configuration:
            last += 1
        contender = contenders.CONTENDERS[cell.optimizer]
        for sliced in [slice(first, last)] if contender.stacked else range(first, last):
            part: contenders.Weights = {
                name: torch.nn.Parameter(w.detach()[sliced]) for name, w in stack.weights.items()
            }
            views += [(parameter, index, sliced) for index, parameter in enumerate(part.values())]
            decay, settings = cell.setup.decay / cell.rate, json.loads(cell.settings)
            if contender.takes_length:
                settings["total_steps"] = cell.setup.steps
            optimizers += contenders.build(cell.optimizer, part, cell.rate, decay, settings)
        first = last
    return optimizers, views


def _updates(
    before: list[Tensor], weights: list[Tensor], names: list[str], factor: float, rates: Tensor, decay: float
) -> Tensor:
    """Return mean and max |u| of each member's step: [2, members]."""
    total = torch.zeros(len(rates), dtype=torch.float64, device=rates.device)
    largest = torch.zeros_like(rates)
    count = 0
    for old, new, name in zip(before, weights, names, strict=True):
        kept = old * (1 - factor * decay) if contenders.is_decayed(name) else old
        moved = (kept - new.detach()).abs().flatten(1)
        total += moved.sum(1, dtype=torch.float64)
        largest = torch.maximum(largest, moved.amax(1))
        count += moved.shape[1]
    return torch.stack([total / count, largest.double()]) / (factor * rates)


def _curve(losses: list[float], setup: Setup) -> Result:
    """Thin a loss curve, find its spikes, and where it diverged."""
    limit = math.log(setup.model.vocabulary) + 1
    return {
        "every": _every(setup),
        "losses": _thin(losses, _every(setup)),
        "spikes": [dataclasses.astuple(spike) for spike in spikes.find(losses)],
        "diverged": next((step for step, loss in enumerate(losses) if not loss <= limit), None),
    }


def _every(setup: Setup) -> int:
    """The steps between two points of a curve; a kick's traces are kept step by step."""
    return 1 if setup.kick_step >= 0 else max(1, setup.steps // POINTS)


def _thin(values: list[float], every: int) -> list[float]:
    """Return the means of ``every`` values each."""
    return _digits(
        [math.fsum(values[i : i + every]) / len(values[i : i + every]) for i in range(0, len(values), every)]
    )


def _digits(values: list[float]) -> list[float]:
    """Round to six significant digits."""
    return [float(f"{value:.6g}") for value in values]
