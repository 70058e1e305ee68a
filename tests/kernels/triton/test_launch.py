"""What a launch compiles, with a driver that pretends to be a GPU: compiled for real, never run."""

import math
from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime import driver

from s3_megatron.errors import S3Error
from s3_megatron.kernels.triton import kernel, launch
from s3_megatron.kernels.triton.audit import TARGETS, Layout, compiled
from tests.kernels.by_keyword import columns_of, triton

BF16 = torch.bfloat16


class _Driver:
    """As much of a driver as compiling asks for."""

    def get_current_target(self):
        return TARGETS["sm_90"]

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class _Compiling:
    """The kernel's stand-in: compiles where a launch would run."""

    def __init__(self, kernel):
        self.kernel, self.launched = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append(self.kernel.warmup(*args, grid=grid, **options))


@pytest.fixture
def compiling(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    real = kernel.s3_step
    monkeypatch.setattr(real, "device_caches", defaultdict(real.create_binder))
    stand_in = _Compiling(real)
    monkeypatch.setattr(kernel, "s3_step", stand_in)
    monkeypatch.setattr(driver, "_active", _Driver())
    return stand_in


def _step(*, sizes=(17, 40, 2000), dtype=BF16, **settings):
    columns = [[torch.zeros(size, dtype=kind) for size in sizes] for kind in (torch.float32, dtype, dtype, dtype)]
    defaults = {"lr": torch.tensor(0.1), "beta1": 0.95, "beta2": 0.95, "p": 3, "weight_decay": 0.1, "nesterov": True}
    triton.s3_step_(*columns, **defaults | settings)


def _pointers(offset):
    """Device inputs that begin ``offset`` elements into their storage."""
    dtypes = {"scale": torch.float32, "found_inf": torch.float32, "statistics": torch.float64}
    inputs = dtypes | {"rounding_seed": torch.int64}
    sizes = {name: 5 if name == "statistics" else 1 for name in inputs}
    return {name: torch.ones(sizes[name] + offset, dtype=dtype)[offset:] for name, dtype in inputs.items()}


def test_two_launches_and_nothing_is_compiled_twice(compiling):
    """1, 0 and multiples of 16 are what Triton likes to compile in; int is another type than float."""
    _step()
    assert len(compiling.launched) == 2
    _step(lr=torch.tensor(1.0), weight_decay=1, beta1=0, maximize=True)
    _step(lr=torch.tensor(16, dtype=torch.float64), weight_decay=0, beta2=0, sizes=(1, 16, 1 << 20))
    assert len({id(built) for built in compiling.launched}) == 2
    _step(**_pointers(0))
    _step(**_pointers(1))
    assert len({id(built) for built in compiling.launched}) == 4
    _step(p=2.5)
    _step(p=8)
    assert len({id(built) for built in compiling.launched}) == 6


def _soft_step(tau, **settings):
    columns = [[torch.zeros(64, dtype=kind)] for kind in (torch.float32, BF16, BF16)]
    defaults = {"lr": torch.tensor(0.1), "beta": 0.9, "weight_decay": 0.1, "nesterov": True}
    triton.softsignum_step_(*columns, tau=tau, **defaults | settings)


def test_softsignum_is_compiled_once_for_each_phase(compiling):
    """Its temperature is another number in every soft step."""
    for tau in (math.inf, math.inf, 1e9, 16.0, 1.0):
        _soft_step(tau)
    _soft_step(math.inf, beta=0, weight_decay=1)
    assert len({id(built) for built in compiling.launched}) == 2


def test_the_audit_compiles_what_a_launch_does(compiling, monkeypatch):
    given = {"scale": torch.ones(1), "found_inf": torch.zeros(1)}
    _step(sizes=(64,), **given)
    _soft_step(5.0, **given)
    _soft_step(math.inf, **given)
    monkeypatch.setattr(kernel, "s3_step", compiling.kernel)
    for launched, softsignum in zip(compiling.launched, (None, "soft", "hard"), strict=True):
        audited = compiled(TARGETS["sm_90"], Layout(grad="bfloat16", state="bfloat16", softsignum=softsignum))
        assert launched.asm["ptx"] == audited.asm["ptx"]


def test_the_stream_of_the_tensors_device_is_queried_for_a_capture(monkeypatch):
    """Incident: the current device was queried, which is another where a model is on the second GPU. There is none
    here, so stand-ins show the order alone."""
    device, entered, queried = torch.device("cuda", 1), [], []

    @contextmanager
    def entering(named):
        entered.append(named)
        yield
        entered.pop()

    def find(*_):
        queried.append(list(entered))
        raise S3Error("enough")

    columns = [[SimpleNamespace(device=device, dtype=torch.float32, element_size=lambda: 4)] for _ in range(4)]
    laid = SimpleNamespace(straight=columns_of(*columns), addresses=None, sizes=None)
    monkeypatch.setattr(torch.cuda, "device", entering)
    monkeypatch.setattr(launch, "lay_out", lambda *_: laid)
    monkeypatch.setattr(launch, "_tables", SimpleNamespace(find=find))
    with pytest.raises(S3Error, match="enough"):
        triton.s3_step_(*columns, lr=0.1, beta1=0.95, beta2=0.95, p=3, weight_decay=0.1, nesterov=True)
    assert queried == [[device]]
