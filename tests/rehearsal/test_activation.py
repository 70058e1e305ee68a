"""torch and Megatron under the rehearsal, and as they were after it."""

import logging
import re
from collections.abc import Iterator

import pytest
import torch

from s3_megatron import rehearsal
from s3_megatron.errors import S3Error
from s3_megatron.rehearsal.cuda import STAND_INS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal refuses to load where CUDA is")


@pytest.fixture
def rehearsed() -> Iterator[None]:
    rehearsal.activate()
    yield
    rehearsal.deactivate()


def test_refuses_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    current_device = torch.cuda.current_device
    with pytest.raises(S3Error, match="this one has Some GPU: drop --rehearsal"):
        rehearsal.activate()
    assert torch.cuda.current_device is current_device


def test_says_so_once_and_undoes_everything(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    owners = (torch.cuda, torch.cuda.random, torch.cuda.memory, torch.accelerator, torch, DistributedOptimizer)
    before = [dict(vars(owner)) for owner in owners]
    iterate = torch.utils.data.DataLoader.__iter__
    rehearsal.activate()
    rehearsal.activate()
    assert capsys.readouterr().err.count("REHEARSAL on CPU") == 1
    assert torch.cuda.is_available()
    rehearsal.deactivate()
    rehearsal.deactivate()
    for owner, names in zip(owners, before, strict=True):
        assert {name for name, value in names.items() if vars(owner)[name] is not value} == set(), owner
    assert torch.utils.data.DataLoader.__iter__ is iterate
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


@pytest.mark.parametrize(
    ("symbol", "message"),
    [
        (
            "torch.accelerator.is_available",
            rf"torch {re.escape(torch.__version__)} has no torch\.accelerator\.is_available, ",
        ),
        (
            "megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue",
            r"this megatron-core has no megatron\.core\.dist_checkpointing\.\S*_results_queue, ",
        ),
    ],
)
def test_a_symbol_that_has_moved_is_named_and_nothing_stays_replaced(
    monkeypatch: pytest.MonkeyPatch, symbol: str, message: str
) -> None:
    """Among the first and among the last that are replaced, so that the other's are put back, too."""
    before = dict(vars(torch.cuda)), torch.compile, torch.utils.data.DataLoader.__iter__
    monkeypatch.delattr(symbol)
    with pytest.raises(S3Error, match=message):
        rehearsal.activate()
    assert {name for name, value in before[0].items() if vars(torch.cuda)[name] is not value} == set()
    assert (torch.compile, torch.utils.data.DataLoader.__iter__) == before[1:]
    assert rehearsal.activation._undo is None


def test_no_two_names_have_one_stand_in() -> None:
    """Incident: where nothing was compiled before the rehearsal, torch.compile ended with "Duplicate torch object"."""
    stand_ins = [each for each in STAND_INS.values() if callable(each)]
    assert len(set(map(id, stand_ins))) == len(stand_ins)


def test_cuda_means_the_cpu_however_it_is_written(rehearsed: None) -> None:
    current = torch.cuda.current_device()
    for device in ("cuda", "cuda:1", current, torch.device("cuda"), torch.device("cuda", current)):
        assert torch.zeros(2, device=device).device.type == "cpu"
        assert torch.zeros(2).to(device).device.type == "cpu"
        assert torch.nn.Linear(2, 2).to(device).weight.device.type == "cpu"
        assert torch.empty_like(torch.zeros(2, device="meta"), device=device).device.type == "cpu"
    assert torch.zeros(2, device="meta").device.type == "meta", "other devices stay"
    assert torch.nn.Linear(2, 2).cuda(current).weight.device.type == "cpu"
    assert torch.zeros(2).cuda(non_blocking=True).device.type == "cpu"
    assert torch.zeros(2, pin_memory=True).pin_memory().device.type == "cpu"
    assert torch.zeros(2).to(torch.bfloat16).dtype is torch.bfloat16, "to() still takes a dtype"


def test_megatrons_questions_get_a_gpus_answers(rehearsed: None) -> None:
    types = [torch.zeros(1, dtype=dtype).type() for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert types == ["torch.cuda.FloatTensor", "torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"]
    assert torch.zeros(1).type(torch.float16).dtype is torch.float16
    assert torch.cuda.memory_allocated() == torch.cuda.max_memory_reserved() == 0
    assert torch.cuda.memory_stats()["reserved_bytes.all.current"] == 0
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
        end.record(torch.cuda.current_stream())
    torch.cuda.synchronize()
    assert end.query()
    assert start.elapsed_time(end) >= 0
    assert torch.compile(len) is len
    assert torch.compile(dynamic=True)(len) is len


def test_the_gpus_generator_is_the_cpus_and_forks(rehearsed: None, caplog: pytest.LogCaptureFixture) -> None:
    """Dropout draws from it: the tracker must keep its streams apart, and give the default one back untouched."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.cuda.manual_seed(3)
    tracker.add("other", 5)
    saved = torch.cuda.get_rng_state()
    with caplog.at_level(logging.WARNING), tracker.fork("other"):
        first = torch.rand(4)
    assert "RNG state changed" not in caplog.text
    assert torch.equal(torch.cuda.get_rng_state(), saved)
    with tracker.fork("other"):
        assert not torch.equal(torch.rand(4), first), "the stream goes on"
    drawn = torch.rand(4)
    torch.cuda.set_rng_state(saved)
    assert torch.equal(torch.rand(4), drawn)
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(3)))


def test_a_loader_leaves_the_generator_alone(rehearsed: None) -> None:
    """A resumed run makes its loaders after it has loaded the generator's state, an uninterrupted one long before."""
    saved = torch.cuda.get_rng_state()
    assert len(list(torch.utils.data.DataLoader(torch.arange(4), pin_memory=True))) == 4
    assert torch.equal(torch.cuda.get_rng_state(), saved)
