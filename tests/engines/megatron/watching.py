"""Runs on ranks, from worker.py: what ``--watch-dir`` has of several optimizers, and of several runs in a process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

# isort: split  (the harness turns the rehearsal on, which has to come before Megatron is imported)
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.training import global_vars
from torch import Tensor

from s3_megatron.engines.megatron import watch
from s3_megatron.optim import S3
from s3_megatron.watch.file import Metrics, read_metrics
from s3_megatron.watch.part import Part
from tests.engines.megatron.harness import DECAY, LR, Run, Single, gradients, set_decay
from tests.rank_checks import shared_folder


@contextmanager
def watched(optimizer: str) -> Iterator[Path]:
    """A run of Megatron, as far as its global arguments make one, with --watch-dir; yields the folder."""
    folder = shared_folder()
    global_vars._GLOBAL_ARGS = SimpleNamespace(watch_dir=str(folder), optimizer=optimizer, log_interval=1)
    try:
        yield folder
    finally:
        global_vars._GLOBAL_ARGS = None


@watch.log_training
def training_log(
    loss_dict: dict[str, float], learning_rate: float, iteration: int, grad_norm: float, skipped_iter: int
) -> None:
    """What ``watch`` wraps, with the arguments that it reads."""


def written(folder: Path) -> Metrics:
    """What the last rank has written: it does so after the reductions, when the others have gone on."""
    dist.barrier()
    return read_metrics(folder)


def moved(run: Run, before: dict[str, Tensor]) -> Tensor:
    """How far each weight of the model went, in units of the rate, less what the decay took."""
    decay = {name: DECAY * (weight.ndim > 1) for name, weight in before.items()}
    went = {name: (before[name] - weight) / LR - decay[name] * before[name] for name, weight in run.weights().items()}
    return torch.cat([each.abs().flatten() for each in went.values()])


def check_an_optimizer_without_an_inner_one_is_not_observed() -> None:
    """MimoOptimizer of megatron-core 0.19 has none: its modules' optimizers are the ones that step."""
    with watched("adam"):
        adam = Run(optimizer="adam")
        watch.observe_parts([adam.part, SimpleNamespace(optimizer=None)], [adam.ddp])
        assert isinstance(adam.optimizer, ChainedOptimizer)


def check_two_optimizers_of_a_run_are_both_watched() -> None:
    """A GAN, or the modules of a MIMO model: the second that was made silently took the place of the first. Each
    line has both; the second is made after the first line, and the third on the last rank alone. Float32 weights of up
    to 4 and steps of LR: 1e-4 of a step is lost in the difference."""
    with watched("s3") as folder:
        runs = [Run()]
        expected: list[list[Tensor]] = []
        for iteration in (1, 2, 3):
            if iteration == 2:
                runs.append(Run(net=Single()))
            if iteration == 3 and dist.get_rank() == dist.get_world_size() - 1:
                lone = torch.nn.Parameter(torch.zeros(1000))
                alone = S3([lone], lr=1.0)
                current = watch.run()
                assert current is not None
                current.observer.add([Part(alone)])
                lone.grad = torch.ones(1000)
                alone.step()
            sizes = []
            for run in runs:
                before = {name: weight.clone() for name, weight in run.weights().items()}
                set_decay(run)
                run.step(gradients(run.net, iteration))
                sizes.append(moved(run, before))
            expected.append(sizes)
            training_log({"lm loss": 1.0}, LR, iteration, 0.5, 0)
        lines = written(folder).train
    first, second, third = (lines[iteration] for iteration in (1, 2, 3))
    assert first.optimizers == {} and first.losses == {"lm_loss": 1.0}
    names = ["optimizer 1", "optimizer 2"]
    assert list(second.optimizers) == names and len(third.optimizers) == 3
    for line, sizes in ((second, expected[1]), (third, expected[2])):
        for name, each in zip(names, sizes, strict=True):
            assert abs(line.optimizers[name].mean / each.mean().item() - 1) < 1e-3, (name, line, each.mean())
            assert abs(line.optimizers[name].max / each.max().item() - 1) < 1e-3
    lone_mean = third.optimizers["optimizer 3"].mean
    assert lone_mean is not None and abs(lone_mean / (1 - 0.95**2) ** (2 / 3) - 1) < 1e-5
    total = sum(sizes.sum().item() for sizes in expected[2]) + 1000 * lone_mean
    count = sum(sizes.numel() for sizes in expected[2]) + 1000
    assert abs(third.updates.mean / (total / count) - 1) < 1e-3


def check_a_run_begins_with_its_arguments() -> None:
    """The second of two runs in one process counted the optimizers of the first, where these were still there."""
    kept = []
    for width in (0, 1):
        with watched("s3") as folder:
            kept.append(Run(net=Single() if width else None))
            kept[-1].step(gradients(kept[-1].net, 0))
            training_log({}, LR, 1, 0.5, 0)
        found = written(folder)
        assert found.optimizer is not None
        assert sum(found.optimizer.shard_elements) == sum(param.numel() for param in kept[-1].net.parameters())
        assert found.train[1].optimizers == {}
    assert watch.run() is None
