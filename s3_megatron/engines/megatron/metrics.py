"""Feeding ``watch``: losses, rates and update sizes of every logged iteration (``--watch-dir``)."""

import functools
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from s3_megatron.optim import EXP_AVG, EXP_AVG_ROOT, S3
from s3_megatron.watch.metrics import MetricsWriter
from s3_megatron.watch.updates import adam_update_statistics


@dataclass(frozen=True)
class Watched:
    """One optimizer of this rank: what wraps it, what it holds, and how far its last step moved that.

    ``master_bytes`` is of the copies it moves instead of the model's weights. ``statistics`` returns five float64,
    as ``statistics`` of ``kernels.op`` (of Adam, sum, max and elements; the rest is 0).
    """

    optimizer: torch.optim.Optimizer
    wrapper: str
    elements: int
    master_bytes: int
    statistics: Callable[[], Tensor]


class _Observer:
    """What one training process watches: its optimizers, and the file it writes."""

    def __init__(self, watched: list[Watched], model_elements: int) -> None:
        self.watched = watched
        self.model_elements = model_elements
        self.described = False
        self.evaluating: tuple[str, int] = ("validation", 0)  # event, iteration
        self.last_log: tuple[int, float] | None = None


_observer: _Observer | None = None


def observe(watched: list[Watched], model_elements: int) -> None:
    """Remember what this process trains with; ``model_elements`` is the size of its model (or model shard)."""
    global _observer
    _observer = _Observer(watched, model_elements)


def observe_parts(parts: list[MegatronOptimizer], model_chunks: list[Any]) -> None:
    """Observe Megatron's optimizer, in its parts."""
    if watching():
        for part in parts:
            if isinstance(part.optimizer, S3):
                device = next((p.device for group in part.param_groups for p in group["params"]), None)
                part.optimizer.update_statistics = torch.zeros(5, dtype=torch.float64, device=device)
    elements = sum(param.numel() for chunk in model_chunks for param in chunk.parameters())
    # MimoOptimizer (0.19.2) has its modules' optimizers, which were observed when they were made, and none itself.
    observe([_watch(part) for part in parts if part.optimizer is not None], elements)


def _watch(part: MegatronOptimizer) -> Watched:
    elements = sum(param.numel() for group in part.param_groups for param in group["params"])
    masters = sum(
        param.numel() * param.element_size()
        # DistributedOptimizer's and Float16OptimizerWithFloat16Params' float32 copies (megatron-core 0.17.1 to 0.19.2).
        for name in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups")
        for group in getattr(part, name, [])
        for param in group
        if param is not None
    )

    def statistics() -> Tensor:
        inner = part.optimizer
        if not isinstance(inner, S3):
            return adam_statistics(inner, elements)
        assert inner.update_statistics is not None, "observe_parts() sets it"
        return inner.update_statistics

    return Watched(part.optimizer, type(part).__name__, elements, masters, statistics)


def adam_statistics(optimizer: torch.optim.Optimizer, elements: int) -> Tensor:
    """Give ``Watched.statistics`` of an Adam that moved ``elements``."""
    found = adam_update_statistics(optimizer)
    statistics = torch.zeros(5, dtype=torch.float64, device=found.device)
    statistics[:2] = found
    statistics[4] = elements
    return statistics


def log_training(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``megatron.training.training.training_log`` (0.17.1 to 0.19.2), called by every rank after every step."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def training_log(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        called = signature.bind(*args, **kwargs).arguments
        directory = _watch_dir()
        if _observer is not None and directory is not None:
            if called["iteration"] % _args().log_interval == 0:
                _write_training(_observer, directory, called)
        return result

    return training_log


def remember_evaluation(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``megatron.training.training.evaluate_and_print_results`` (0.17.1 to 0.19.2).

    It knows what is evaluated, and when. Its ``prefix`` is "iteration 8", "iteration 8 on validation set", or
    "iteration 8 on test set".
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def evaluate_and_print_results(*args: Any, **kwargs: Any) -> Any:
        if _observer is not None:
            called = signature.bind(*args, **kwargs).arguments
            kind = "test" if called["prefix"].endswith("test set") else "validation"
            _observer.evaluating = (kind, called["iteration"])
        return original(*args, **kwargs)

    return evaluate_and_print_results


def log_validation(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``megatron.training.training.evaluate`` (0.17.1 to 0.19.2): it returns the validation losses."""

    @functools.wraps(original)
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        directory = _watch_dir()
        losses = result[0]
        if _observer is not None and directory is not None and losses and _is_writer():
            kind, iteration = _observer.evaluating
            _writer(directory).write({"event": kind, "iteration": iteration, **_losses(losses)})
        return result

    return evaluate


def _write_training(observer: _Observer, directory: Path, called: dict[str, Any]) -> None:
    """Write one line; every rank takes part in the reductions."""
    if not observer.described:
        description = _describe(observer)
        observer.described = True
        if _is_writer():
            _writer(directory).write(description)
    skipped = bool(called["skipped_iter"])
    updates = _reduced_updates(observer.watched)
    if not _is_writer():
        return
    now, iteration = time.perf_counter(), called["iteration"]
    seconds = None
    if observer.last_log is not None:
        seconds = (now - observer.last_log[1]) / (iteration - observer.last_log[0])
    observer.last_log = (iteration, now)
    event = {
        "event": "train",
        "iteration": iteration,
        **_losses(called["loss_dict"]),
        "lr": called["learning_rate"],
        "grad_norm": None if called["grad_norm"] is None else float(called["grad_norm"]),
        "skipped": skipped,
        **{name: None if skipped else value for name, value in updates.items()},
        "seconds": seconds,
    }
    _writer(directory).write(event)
    _mirror(event)


def _mirror(event: dict[str, Any]) -> None:
    """Write the update sizes, which Megatron has not, to its TensorBoard and W&B writers."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    scalars = {name: value for name, value in event.items() if name.startswith("update_") and value is not None}
    if writer := get_tensorboard_writer():
        for name, value in scalars.items():
            writer.add_scalar(name, value, event["iteration"])
    if wandb := get_wandb_writer():
        wandb.log(scalars, event["iteration"])


def _losses(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name.replace(" ", "_"): float(value) for name, value in losses.items()}


def _reduced_updates(watched: list[Watched]) -> dict[str, float | None]:
    """Mean and max of |update| over all ranks, in units of the learning rate, and for S3 the shares of its kernel.

    ``update_saturated`` is the share of elements with |update| > 0.9, ``update_agreement`` of those that move against
    their gradient. Every rank's elements count once, so a parameter that tensor-parallel ranks hold in common weighs
    more. None where there is nothing to tell.
    """
    device = _device()
    # As in kernels.op: sum |u|, max |u|, count |u| > 0.9, count of the gradient's sign, elements.
    totals = torch.zeros(5, dtype=torch.float64, device=device)
    largest = torch.zeros(1, dtype=torch.float64, device=device)
    for optimizer in watched:
        statistics = optimizer.statistics().to(device)
        totals += statistics
        largest = torch.maximum(largest, statistics[1:2])
    dist.all_reduce(totals)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    total, _, saturated, agreeing, elements = totals.tolist()
    of_s3 = elements and _args().optimizer == "s3"
    return {
        "update_mean": total / elements if elements else None,
        "update_max": largest.item() if elements else None,
        "update_saturated": saturated / elements if of_s3 else None,
        "update_agreement": agreeing / elements if of_s3 else None,
    }


def _describe(observer: _Observer) -> dict[str, Any]:
    """Say what is sharded how; bytes are the worst rank's, per parameter of its model shard."""
    state = sum(
        tensor.numel() * tensor.element_size()
        for watched in observer.watched
        for entry in watched.optimizer.state.values()
        for name, tensor in entry.items()
        if name in (EXP_AVG, EXP_AVG_ROOT)
    )
    mine = {
        "elements": sum(watched.elements for watched in observer.watched),
        "state": state / observer.model_elements,
        "masters": sum(watched.master_bytes for watched in observer.watched) / observer.model_elements,
        "model": observer.model_elements,
    }
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return {
        "event": "optimizer",
        "name": _args().optimizer,
        "wrapper": ", ".join(sorted({watched.wrapper for watched in observer.watched})),
        "world_size": len(ranks),
        "parameters": mine["model"],
        "shard_elements": [rank["elements"] for rank in ranks],
        "state_bytes_per_param_rank": max(rank["state"] for rank in ranks),
        "master_bytes_per_param_rank": max(rank["masters"] for rank in ranks),
    }


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@functools.cache
def _writer(directory: Path) -> MetricsWriter:
    return MetricsWriter(directory)


def _is_writer() -> bool:
    """The last rank has the losses under every parallel layout."""
    return bool(dist.get_rank() == dist.get_world_size() - 1)


def _args() -> Any:
    from megatron.training import get_args

    return get_args()


def watching() -> bool:
    """Whether ``--watch-dir`` was given."""
    return _watch_dir() is not None


def _watch_dir() -> Path | None:
    """The flag's value; None too where a user of megatron.core alone has no global arguments."""
    from megatron.training.global_vars import _GLOBAL_ARGS

    directory = getattr(_GLOBAL_ARGS, "watch_dir", None)
    return None if directory is None else Path(directory)
