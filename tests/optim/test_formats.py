"""The seam of state formats is real: one more object trains S3, by foreach, and no other line knows of it."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from s3_megatron.errors import S3Error
from s3_megatron.kernels.formats import FORMATS, Format
from s3_megatron.optim import EXP_AVG, EXP_AVG_ROOT, S3

HALF = torch.float16
RATE = 0.01


class Ratio(Format):
    """m as its ratio to r, and r kept times two, both in float16: neither is read or written without the other."""

    name = "float16"
    columns: ClassVar = {"m": HALF, "r": HALF}

    def read_pair(self, m: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        size = r.float() / 2
        return m.float() * size, size

    def write_pair(self, stored, m: Tensor, r: Tensor, *, moving: Tensor, seed, first: int) -> None:
        coded = torch.where(r > 0, m / r, 0.0), r * 2
        for state, values in zip(stored, coded, strict=True):
            state.copy_(torch.where(moving, values.to(HALF), state))

    def to_full(self, stored: Sequence[Tensor]) -> list[Tensor]:
        return [*self.read_pair(*stored)]

    def from_full(self, full: Sequence[Tensor]) -> list[Tensor]:
        m, r = (x.float() for x in full)
        return [torch.where(r > 0, m / r, 0.0).to(HALF), (r * 2).to(HALF)]


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(FORMATS, "float16", Ratio())
    yield


def made(state_dtype: torch.dtype = HALF, **settings: Any) -> tuple[list[nn.Parameter], S3]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(4).double())]
    return params, S3(params, lr=RATE, weight_decay=0.1, state_dtype=state_dtype, **settings)


def steps(params: list[nn.Parameter], optimizer: S3, numbers: range) -> Tensor:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    return torch.cat([param.detach().reshape(-1).double() for param in params])


def test_it_trains_as_float32_does() -> None:
    """float16 rounds each state by 2^-12 a step, which beta 0.95 forgets in 20: u is off by 20 * 2 * 2^-12 = 0.01 at
    the very most, and 30 steps at a rate of 0.01 by 0.003. Not the same to the bit, or the format was not used."""
    moved, wanted = (steps(*made(dtype), range(30)) for dtype in (HALF, torch.float32))
    params, _ = made()
    assert 0 < (moved - wanted).abs().max() < 0.003
    assert all((moved[:22] - torch.cat([x.detach().reshape(-1) for x in params[:2]])).abs() > 0)
    assert torch.equal(moved[22:], wanted[22:]), "float64 has its own format"


def test_its_states_are_what_it_says_and_a_broken_gradient_keeps_their_bits() -> None:
    params, optimizer = made()
    steps(params, optimizer, range(3))
    before = {name: x.clone() for name, x in optimizer.state[params[1]].items()}
    assert {x.dtype for x in before.values()} == {HALF} and before[EXP_AVG].abs().max() <= 1
    for param in params:
        param.grad = torch.full_like(param, torch.nan)
    optimizer.step()
    assert all(torch.equal(x, before[name]) for name, x in optimizer.state[params[1]].items())


@pytest.mark.parametrize("onward", [HALF, torch.float32])
@pytest.mark.parametrize("first", [HALF, torch.float32])
def test_a_checkpoint_is_every_formats(first: torch.dtype, onward: torch.dtype) -> None:
    """Decoded as it is saved, and coded as it is loaded: to the bit in its own format, and in another as above."""
    params, optimizer = made(first)
    steps(params, optimizer, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    assert {x.dtype for x in saved["state"][0].values()} == {torch.float32}
    theirs, loaded = made(onward)
    for ours, its in zip(params, theirs, strict=True):
        its.data.copy_(ours.data)
    loaded.load_state_dict(saved)
    states = [x[EXP_AVG_ROOT].dtype for x in loaded.state.values()]
    assert states == [onward, onward, torch.float64]
    a, b = steps(params, optimizer, range(5, 9)), steps(theirs, loaded, range(5, 9))
    assert torch.equal(a, b) if first == onward else 0 < (a - b).abs().max() < 0.003


def test_a_compiled_step_is_the_eager_step() -> None:
    def run(*, is_compiled: bool) -> Tensor:
        params, optimizer = made()
        steps(params, optimizer, range(1))
        torch._dynamo.reset()
        if is_compiled:
            optimizer.step = torch.compile(optimizer.step, backend="aot_eager")  # type: ignore[method-assign]
        return steps(params, optimizer, range(1, 4))

    assert torch.equal(run(is_compiled=True), run(is_compiled=False))


def test_a_compiled_kernel_that_was_asked_for_refuses_it() -> None:
    params, optimizer = made(implementation="cpu")
    with pytest.raises(S3Error, match="states in float32 and bfloat16, and not in float16"):
        steps(params[:2], optimizer, range(1))


def test_without_it_its_dtype_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FORMATS, "float16")
    with pytest.raises(S3Error, match=r"must be torch.float32 or torch.bfloat16$"):
        made()
