"""What watches one run: it knows the run's optimizers, and writes what they did at the iterations that are logged."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.watch import events, statistics
from s3_megatron.watch.file import Writer
from s3_megatron.watch.part import Part
from s3_megatron.watch.sinks import Sink

logger = logging.getLogger(__name__)

Losses = Mapping[str, Tensor | float]


@dataclass
class _Watched:
    """What goes by one name: the parts of one optimizer, and the elements of its model (or model shard)."""

    parts: list[Part]
    model_elements: int


class Observer:
    """Watches one run: make one a run, on every rank, before its first step.

    A process may hold several, each with its own optimizers and folder; nothing is shared between them.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        /,
        *optimizers: torch.optim.Optimizer,
        sinks: Sequence[Sink] = (),
        **named: torch.optim.Optimizer,
    ) -> None:
        """Write to ``directory/metrics.jsonl``, from the last rank, and to ``sinks`` (``watch.sinks``).

        Args:
            directory: a folder, made where it is missing; a resumed run names the same.
            optimizers: torch optimizers; update sizes are those of S3 and of Adam's kind.
            sinks: where events go besides.
            named: optimizers by name, where there are several: every line has the sizes of each.

        Raises:
            S3Error: nothing can be written to ``directory``.
        """
        self._watched: dict[str, _Watched] = {}
        self._names: list[str] = []  # of all ranks' optimizers, as of the last description
        self._added = True  # an optimizer since then; a run without one is described, too
        self._unknown: set[str] = set()
        self._last: tuple[int, float] | None = None
        self._sinks: list[Sink] = []
        self._failures: dict[Sink, str] = {}
        if _rank() == _ranks() - 1:  # it has the losses under every parallel layout
            self._sinks = [Writer(Path(directory)), *sinks]
        for optimizer in optimizers:
            self.add([Part(optimizer)])
        for name, optimizer in named.items():
            self.add([Part(optimizer)], name=name)

    def add(self, parts: Sequence[Part], model_elements: int | None = None, name: str | None = None) -> None:
        """Watch one more optimizer, in its parts on this rank; ``model_elements``: of its model, if not the parts'."""
        if model_elements is None:
            model_elements = sum(part.model_elements for part in parts)
        self._watched = {key: each for key, each in self._watched.items() if any(part.alive for part in each.parts)}
        number = len(self._watched) + 1
        while name is None or name in self._watched:
            name, number = f"optimizer {number}", number + 1
        self._watched[name] = _Watched(list(parts), model_elements)
        self._added = True

    def train(
        self,
        iteration: int,
        losses: Losses,
        *,
        lr: float | None = None,
        grad_norm: float | Tensor | None = None,
        skipped: bool = False,
    ) -> None:
        """Write one line about ``iteration``, whose step is done; every rank calls it, since sizes are reduced.

        Args:
            iteration: counted from 1 on.
            losses: by name; this reads them from the device.
            lr: the rate; the first optimizer's if None.
            grad_norm: of the whole gradient.
            skipped: whether no step was made, as after an overflow; then there are no sizes.
        """
        all_updates, each = self._reduced_updates(skipped)
        if not self._sinks:
            return
        if not skipped:
            self._warn_of_unknown(each)
        now, seconds = time.perf_counter(), None
        if self._last is not None and iteration > self._last[0]:  # not after a restart in the process
            seconds = (now - self._last[1]) / (iteration - self._last[0])
        self._last = (iteration, now)
        parts = [part for watched in self._watched.values() for part in watched.parts if part.alive]
        self._write(
            events.Train(
                iteration=int(iteration),
                losses=_read(losses),
                lr=parts[0].lr if lr is None and parts else None if lr is None else float(lr),
                grad_norm=None if grad_norm is None else float(grad_norm),
                skipped=skipped,
                updates=events.Updates() if skipped else all_updates,
                seconds=seconds,
                optimizers={} if skipped or len(each) < 2 else each,
            )
        )

    def evaluation(self, kind: events.EvaluationKind, iteration: int, losses: Losses) -> None:
        """Write one line about losses on the validation or test set; not a collective."""
        if self._sinks:
            self._write(events.Evaluation(kind, iteration, _read(losses)))

    def _reduced_updates(self, skipped: bool) -> tuple[events.Updates, dict[str, events.Updates]]:
        """Reduce sizes over all ranks: of all optimizers together, and of each by name.

        Every rank's elements count once, so a parameter that tensor-parallel ranks hold in common weighs more.
        """
        # Before the first step that is made, as after an overflow, most optimizers have no state to describe.
        table = self._reduced_table(self._added and not skipped)
        if table[-1][0]:
            self._describe()
            table = self._reduced_table(False)
        together = statistics.zeros()
        for row in table[:-1]:
            statistics.merge_(together, torch.tensor(row, dtype=torch.float64))
        each = {name: statistics.updates(row) for name, row in zip(self._names, table[:-1], strict=True)}
        return statistics.updates(together.tolist()), each

    def _reduced_table(self, has_news: bool) -> list[list[float]]:
        """Give a row of statistics for every optimizer, and one that begins with how many ranks have news to describe.

        Ranks may hold different optimizers, as in a model of modules, and add one at any time.
        """
        table = statistics.zeros(len(self._names) + 1, device=_device())
        table[-1, 0] = has_news
        for name, row in zip(self._names, table, strict=False):
            for part in self._watched[name].parts if name in self._watched else ():
                statistics.merge_(row, part.statistics().to(table.device))
        statistics.reduce_(table)
        rows: list[list[float]] = table.tolist()
        return rows

    def _describe(self) -> None:
        """Agree on the optimizers' names, and write what is sharded how; a collective."""
        parts = [part for watched in self._watched.values() for part in watched.parts]
        model = sum(watched.model_elements for watched in self._watched.values())
        state, masters = sum(part.state_bytes() for part in parts), sum(part.master_bytes for part in parts)
        mine = {
            "names": list(self._watched),
            "elements": sum(part.elements for part in parts),
            "state": state / model if model else 0.0,
            "masters": masters / model if model else 0.0,
        }
        ranks: list[dict[str, Any]] = [mine]
        if _ranks() > 1:
            ranks = [{}] * _ranks()
            dist.all_gather_object(ranks, mine)
        self._names = sorted({name for rank in ranks for name in rank["names"]})
        self._added = False
        self._write(
            events.Optimizer(
                name=", ".join(sorted({part.kind for part in parts})),
                wrapper=", ".join(sorted({part.wrapper for part in parts})),
                world_size=len(ranks),
                parameters=model,
                shard_elements=[rank["elements"] for rank in ranks],
                state_bytes_per_param_rank=max(rank["state"] for rank in ranks),
                master_bytes_per_param_rank=max(rank["masters"] for rank in ranks),
            )
        )

    def _warn_of_unknown(self, each: dict[str, events.Updates]) -> None:
        for name, updates in each.items():
            parts = self._watched[name].parts if name in self._watched else []
            if updates.mean is None and name not in self._unknown and any(part.elements for part in parts):
                self._unknown.add(name)
                kinds = ", ".join(sorted({part.kind for part in parts}))
                logger.warning(
                    "no update size of %s (%s) is known so far: S3's are watched, and those of Adam in its plain form",
                    name,
                    kinds,
                )

    def _write(self, event: events.Event) -> None:
        """Hand ``event`` to every sink; one that fails costs its line, not the run."""
        for sink in self._sinks:
            try:
                sink.write(event)
            except Exception as error:  # a sink is another's code: W&B raises after its own end
                message = f"{type(error).__name__}: {error}"
                if self._failures.get(sink) != message:
                    self._failures[sink] = message
                    logger.warning("%s does not take what is watched: %s", type(sink).__name__, message)


def _read(losses: Losses) -> dict[str, float]:
    # Detached: torch warns of a loss with its graph, which is what a loop of one's own has.
    read = {
        name.replace(" ", "_"): float(value.detach() if isinstance(value, Tensor) else value)
        for name, value in losses.items()
    }
    if taken := events.RESERVED & read.keys():
        raise S3Error(f"a loss has the name {', '.join(sorted(taken))}, which a line of metrics has for something else")
    return read


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _device() -> torch.device:
    """Where ranks can reduce."""
    return torch.device("cuda" if _ranks() > 1 and dist.get_backend() == "nccl" else "cpu")
