"""Feeding ``watch`` from Megatron's loop (``--watch-dir``): every logged iteration, and every evaluation."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from s3_megatron.watch import sinks
from s3_megatron.watch.events import EvaluationKind
from s3_megatron.watch.observer import Observer
from s3_megatron.watch.part import Part

# DistributedOptimizer's and Float16OptimizerWithFloat16Params' float32 copies (megatron-core 0.17.1 to 0.19.2).
_MASTERS = ("shard_fp32_from_float16_groups", "fp32_from_float16_groups")
_Given = Mapping[str, Any]  # a call's arguments by name
_Call = Callable[[], Any]


class _Run:
    """A run of Megatron is one set of its global arguments: what it trains with, and what it evaluates now."""

    def __init__(self, args: Any) -> None:
        # The writers are there on the last rank, which is the observer's, too.
        from megatron.training import get_tensorboard_writer, get_wandb_writer

        self.args = args
        mirrors = sinks.mirrors(get_tensorboard_writer(), get_wandb_writer())
        self.observer = Observer(args.watch_dir, sinks=mirrors)
        self.evaluating: tuple[EvaluationKind, int] = ("validation", 0)  # what, iteration


_run: _Run | None = None


def run() -> _Run | None:
    """Give the run that this process is in; None without ``--watch-dir``, or for a user of megatron.core alone."""
    global _run
    from megatron.training.global_vars import _GLOBAL_ARGS

    if _run is None or _run.args is not _GLOBAL_ARGS:
        _run = None if getattr(_GLOBAL_ARGS, "watch_dir", None) is None else _Run(_GLOBAL_ARGS)
    return _run


def observe_parts(parts: list[MegatronOptimizer], model_chunks: list[Any]) -> None:
    """Watch one more of the run's optimizers, in its parts."""
    if (current := run()) is None:
        return
    mine = []
    # MimoOptimizer (0.19.2) has its modules' optimizers, which are watched since they were made, and none itself.
    for each in (part for part in parts if part.optimizer is not None):
        copies = [param for name in _MASTERS for group in getattr(each, name, []) for param in group]
        size = sum(param.numel() * param.element_size() for param in copies if param is not None)
        mine.append(Part(each.optimizer, kind=current.args.optimizer, wrapper=type(each).__name__, master_bytes=size))
    current.observer.add(mine, sum(param.numel() for chunk in model_chunks for param in chunk.parameters()))


def _wrapping(see: Callable[[_Run, _Given, _Call], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make ``see`` a wrapper of a host's function: where there is a run it stands for the call, which it gets."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            call, current = functools.partial(original, *args, **kwargs), run()
            return call() if current is None else see(current, signature.bind(*args, **kwargs).arguments, call)

        return wrapper

    return wrap


@_wrapping
def log_training(current: _Run, given: _Given, call: _Call) -> Any:
    """Wrap ``megatron.training.training.training_log`` (0.17.1 to 0.19.2), called by every rank after every step."""
    result = call()
    if given["iteration"] % current.args.log_interval == 0:
        lr, norm, skipped = given["learning_rate"], given["grad_norm"], bool(given["skipped_iter"])
        current.observer.train(given["iteration"], given["loss_dict"], lr=lr, grad_norm=norm, skipped=skipped)
    return result


@_wrapping
def remember_evaluation(current: _Run, given: _Given, call: _Call) -> Any:
    """Wrap ``megatron.training.training.evaluate_and_print_results`` (0.17.1 to 0.19.2): what is evaluated, when."""
    # The prefix is "iteration 8", "iteration 8 on validation set", or "iteration 8 on test set".
    current.evaluating = ("test" if given["prefix"].endswith("test set") else "validation", given["iteration"])
    return call()


@_wrapping
def log_validation(current: _Run, _: _Given, call: _Call) -> Any:
    """Wrap ``megatron.training.training.evaluate`` (0.17.1 to 0.19.2): it returns the validation losses."""
    result = call()
    if losses := result[0]:
        current.observer.evaluation(*current.evaluating, losses)
    return result
