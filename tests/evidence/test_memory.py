"""The memory of a GPU: how many runs a stack has, and what ends a worker that finds too little."""

import math
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
import torch

from s3_megatron.errors import S3Error
from s3_megatron.evidence import compare, experiments
from s3_megatron.evidence.plan import Plan
from s3_megatron.evidence.workers import Workers
from tests.evidence import simulated


class TestMemory:
    """How many runs a stack has on a GPU, by its free memory; torch's figure is given here, since there is no GPU."""

    @pytest.fixture(autouse=True)
    def free(self, monkeypatch):
        self.gib = 139.0
        monkeypatch.setattr(compare.torch.cuda, "mem_get_info", lambda: (self.gib * 2**30, 140 * 2**30))

    def test_members_share_it_with_the_other_workers(self):
        setups = experiments.load("table2").setups.values()
        alone, shared = (compare.members_that_fit(setups, "cuda", workers) for workers in (1, 6))
        assert alone == compare.MOST_MEMBERS and 16 <= shared <= alone
        assert compare.members_that_fit(experiments.load("ladder").setups.values(), "cuda", 6) >= 1

    def test_too_little_is_one_line(self):
        self.gib = 0.3
        with pytest.raises(
            S3Error, match=r"a run needs about 0.\d GiB, and each of 6 workers may have 0.0 .*fewer --workers"
        ) as caught:
            compare.members_that_fit(experiments.load("table2").setups.values(), "cuda", 6)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "error, message",
        [
            (
                torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
                r"a stack of 2 does not fit into the memory: .* \(CUDA out of memory. Tried\)",
            ),
            (  # under ulimit -v, as torch 2.13 says it
                RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. CPU: can't allocate memory: you tried\nx"),
                "a stack of 2 does not fit into the memory: end what else is in it, or give fewer --workers",
            ),
            (MemoryError(), r"a stack of 2 does not fit into the memory: .* \(MemoryError\)"),
            (BrokenProcessPool("gone"), "a worker was killed, perhaps for its memory; what is finished is kept"),
        ],
    )
    def test_what_ends_a_worker_is_one_line(self, error, message):
        with pytest.raises(S3Error, match=message) as caught:
            self.finished(error)
        assert "\n" not in str(caught.value)

    def test_another_error_of_a_worker_is_raised_as_it_is(self):
        with pytest.raises(RuntimeError, match=r"^shapes differ$") as caught:
            self.finished(RuntimeError("shapes differ"))
        assert type(caught.value) is RuntimeError

    def finished(self, error):
        """A pool is not started: a future with the error stands in for a worker that ran out of memory."""
        pool, future = Workers.__new__(Workers), Future()
        future.set_exception(error)
        pool._deadline = SimpleNamespace(value=math.inf)
        pool._free, pool._running = [], {future: (0, Plan(simulated.experiment(), "").ready({})[:2])}
        pool.finished(1.0)
