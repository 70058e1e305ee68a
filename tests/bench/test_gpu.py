"""The benchmark's road on a GPU, on a CPU that answers as one: what is measured, and when; figures mean nothing.

The stand-ins are the rehearsal's, and a graph that runs its step again: no GPU is here, and its first visit is short.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch

from s3_megatron.bench import contenders, step, timing
from s3_megatron.rehearsal.cuda import STAND_INS, CudaIsCpu


class Graph:
    """A captured step; ``replay`` counts."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


@pytest.fixture
def card() -> Iterator[list[int]]:
    """A CPU as "cuda"; the cycles that its queue was held up."""
    held: list[int] = []
    stand_ins = {**STAND_INS, "_sleep": held.append, "CUDAGraph": Graph, "graph": lambda graph: nullcontext()}
    stand_ins["get_device_name"] = lambda *args: "a card"
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        stack.enter_context(patch.object(torch.accelerator, "is_available", lambda: False))
        stack.enter_context(CudaIsCpu())
        yield held


def test_a_gpus_rows_have_the_kernels_time_a_graphs_and_the_copys_bandwidth(card: list[int], monkeypatch: Any) -> None:
    monkeypatch.setattr(step, "MANY_FROM", 20_000)
    monkeypatch.setattr(step, "MANY", 20)
    monkeypatch.setattr(step, "SHARDS", 10)
    chosen = ("S3 p=3", "S3 p=3, bf16 stochastic", "S3 p=3, foreach", contenders.ADAMW, "AdamW, torch foreach")
    monkeypatch.setattr(step, "ceilings", lambda device, repeats: (30e9, 20e9))  # of 2 GB each, on a GPU
    monkeypatch.setattr(step.host, "TENSORS", (1, 10))
    monkeypatch.setattr(contenders, "_others", lambda device: iter(()))  # each needs a real GPU
    few = [dataclasses.replace(one, most=15 if "foreach" in one.name else 99)
           for one in contenders.contenders("cuda")[0] if one.name in chosen]  # fmt: skip
    monkeypatch.setattr(step, "contenders", lambda device: (few, []))
    seen: list[int] = []
    result = step.measure(
        "cuda", [20_011], threads=1, repeats=2, on_rows=lambda partial: seen.append(len(partial.rows))
    )
    by_layout = {count: [row.name for row in result.rows if row.tensors == count] for count in (1, 10, 20)}
    assert len(by_layout[1]) == len(by_layout[10]) == 5 and len(by_layout[20]) == 3
    assert seen == [5, 10, 13, 13] and not result.missing
    for row in result.rows:
        assert row.kernel_ms is not None and row.kernel_ratio is not None
        assert row.bandwidth == pytest.approx(row.bytes * 20_011 / row.kernel_ms / 1e6)
        assert row.share_of_copy == pytest.approx(row.bandwidth / 20)
        assert (row.graph_ms is None) == ("foreach" in row.name)
    assert Graph.replays == 3 * 3 * (timing.WARM_UP + 2)
    assert len(card) == len(result.rows) * (timing.WARM_UP + 2), "the queue is held before every step of its own time"
    table = next(step.tables(result))
    assert [str(column.header) for column in table.columns][1:6] == ["ms", "x AdamW", "bytes", "kernel ms", "kernel x"]


def test_a_contender_that_does_not_fit_is_named_and_the_rest_goes_on() -> None:
    class Large(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.\nand more")

    missing: list[str] = []
    params = step._parameters(100, 1, "cpu")
    entrants = [contenders.Contender("large", Large, 28), contenders.Contender("small", torch.optim.SGD, 12)]
    times, graphs = step._times(entrants, params, "cpu", 1, missing)
    assert list(times) == ["small"] and not graphs
    assert missing == ["large, 1 tensors: CUDA out of memory. Tried to allocate 8 GiB."]


def test_what_a_gpu_is_compared_with() -> None:
    """torch's foreach AdamW was left out above 50 million weights, where it is what Megatron steps with by itself."""
    found, missing = contenders.contenders("cuda")
    by_name = {one.name: one for one in found}
    assert by_name["AdamW, torch foreach"].largest >= 345e6
    assert by_name["S3 p=3"].largest == by_name[contenders.ADAMW].largest == float("inf")
    named = " ".join([*by_name, *missing])
    for rival in ("FusedAdam, DeepSpeed", "Transformer Engine", "Apex", "bitsandbytes", "torchao"):
        assert rival in named
