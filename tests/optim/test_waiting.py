"""A step never waits for the GPU: the class and the foreach kernel on a GPU that is not there (tests/fake_gpu.py)."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from s3_megatron.kernels import op, triton
from s3_megatron.kernels.call import Step
from s3_megatron.optim import S3, SoftMuon, SoftSignum
from s3_megatron.watch.updates import adam_statistics
from tests.fake_gpu import fake_gpu, never_waiting

BRAIN = torch.bfloat16
SETTINGS: list[dict[str, Any]] = [
    {},
    {"state_dtype": BRAIN},
    {"state_dtype": BRAIN, "rounding_seed": 0},
    {"state_dtype": BRAIN, "rounding_seed": 0, "capturable": True},
    {"p": 1.5, "betas": (0.9, 0.95), "nesterov": False},
]


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Step]]:
    """A Triton kernel that could run and does nothing, for tensors without values have no addresses; what it got."""
    calls: list[Step] = []
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "step_", lambda columns, rule, step, memory: calls.append(step))
    for cached in (op.choose, op._announce):
        cached.cache_clear()
    yield calls
    for cached in (op.choose, op._announce):
        cached.cache_clear()


def stepped(**settings: Any) -> None:
    params = [torch.nn.Parameter(torch.randn(size, device="cuda")) for size in (3, 5)]
    optimizer = S3(params, lr=0.1, weight_decay=0.1, **settings)
    optimizer.update_statistics = torch.zeros(5, dtype=torch.float64, device="cuda")
    for param in params:
        param.grad = torch.randn_like(param)
    with never_waiting():
        for _ in range(3):
            optimizer.next_step = Step(factor=torch.ones(1, device="cuda"))
            optimizer.step()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(settings) or "defaults")
def test_a_step_does_not_wait(launched: list[Step], settings: dict[str, Any]) -> None:
    """With ``rounding_seed`` every step copied the seed from the host and waited for it: tests/gpu, which has torch
    watch over that, called the kernel and not the class. Making the optimizer may wait."""
    with fake_gpu():
        stepped(**settings)
    assert len(launched) == 3, "the kernel for GPUs was to be called"
    for step in launched:
        seed = step.seed
        assert (seed is None) == ("rounding_seed" not in settings) and (seed is None or seed.device.type == "cuda")


@pytest.mark.parametrize("implementation", ["auto", "foreach"])
@pytest.mark.parametrize("settings", [{}, {"state_dtype": BRAIN, "rounding_seed": 0}], ids=str)
def test_softsignum_does_not_wait(launched: list[Step], settings: dict[str, Any], implementation: str) -> None:
    """In both phases, with a factor and statistics; the step that takes the medians is left out."""
    with fake_gpu():
        params = [torch.nn.Parameter(torch.randn(size, device="cuda")) for size in (3, 5)]
        run = {"total_steps": 8, "soft_start": 0.5, "implementation": implementation}
        optimizer = SoftSignum(params, lr=0.1, weight_decay=0.1, **run, **settings)
        optimizer.update_statistics = torch.zeros(5, dtype=torch.float64, device="cuda")
        for param in params:
            param.grad = torch.randn_like(param)
        with never_waiting():
            for taken in (0, 6):
                soft = {"soft_mu": 1e-4, "soft_sigma": 1e-4, "soft_first": 4, "soft_length": 4} if taken else {}
                optimizer.write_to_groups(steps_taken=taken, **soft)
                optimizer.next_step = Step(factor=torch.ones(1, device="cuda"))
                optimizer.step()
    assert len(launched) == 2 * (implementation == "auto"), "the kernel for GPUs was to be called"
    for step in launched:
        assert step.factor is not None and step.statistics is optimizer.update_statistics
        assert (step.seed is None) == ("rounding_seed" not in settings)


@pytest.mark.parametrize("precision", ["medium", "highest"])
def test_softmuon_does_not_wait(precision: str) -> None:
    """In both phases, with a split weight and statistics: the map's steps and precision are chosen by numbers of the
    host. The step that takes singular values is left out."""
    with fake_gpu():
        params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in ((8, 4), (4, 6))]
        groups = [{"params": params[:1], "qkv_split_shapes": (2, 1, 1)}, {"params": params[1:]}]
        run = {"total_steps": 8, "soft_start": 0.5, "fp32_matmul_prec": precision}
        optimizer = SoftMuon(groups, lr=0.1, weight_decay=0.1, **run)
        optimizer.update_statistics = torch.zeros(5, dtype=torch.float64, device="cuda")
        for param in params:
            param.grad = torch.randn_like(param)
        with never_waiting():
            for taken in (0, 5, 7):
                soft = {"soft_mu": 1e-4, "soft_sigma": 1e-4, "soft_first": 4, "soft_length": 4} if taken else {}
                optimizer.write_to_groups(steps_taken=taken, soft_norm=2e-4, soft_largest=1e-4, **soft)
                optimizer.step()
                assert optimizer.param_groups[0]["steps_taken"] == taken + 1


@pytest.mark.parametrize("rate", [lambda: torch.tensor([0.1]), lambda: torch.full((1,), 0.1, device="cuda")])
def test_softmuon_takes_a_rate_from_the_host_and_matrices_on_two_devices(rate: Callable[[], Tensor]) -> None:
    """A rate of shape [1] on the host, which S3 takes, met weights on the GPU; and so did singular values of another
    device, at the first soft step. What reads them first is the end of that measurement."""
    with fake_gpu():
        params = [torch.nn.Parameter(torch.randn(4, 3, device=device)) for device in ("cuda", "cpu")]
        optimizer = SoftMuon(params[:1], rate(), 0.1, total_steps=2, soft_start=0.5)
        optimizer.add_param_group({"params": params[1:], "lr": 0.1})
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
            optimizer.step()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(settings) or "defaults")
def test_a_step_by_foreach_does_not_wait(settings: dict[str, Any]) -> None:
    with fake_gpu():
        stepped(implementation="foreach", **settings)


def test_adams_update_is_reduced_where_it_is() -> None:
    """It went to the host in float64, 2.8 GB for 345M weights on one GPU, at every logged iteration."""
    with fake_gpu(), never_waiting():
        param = torch.nn.Parameter(torch.randn(7, device="cuda"))
        optimizer = torch.optim.AdamW([param])
        optimizer.state[param] = {"step": 3, "exp_avg": torch.randn_like(param), "exp_avg_sq": torch.rand_like(param)}
        assert adam_statistics(optimizer).device.type == "cuda"


def test_waiting_is_seen() -> None:
    """The checks above can fail: what waits is refused, each in its way."""
    with fake_gpu(), never_waiting():
        x = torch.randn(5, device="cuda")
        for wait in (
            lambda: torch.as_tensor(5, device="cuda"),
            lambda: x.cpu(),
            lambda: x.sum().item(),
            lambda: x.nonzero(),
            lambda: torch.empty(5).copy_(x),
        ):
            with pytest.raises(Exception, match=r"waits|_local_scalar_dense|nonzero"):
                wait()
        torch.empty(5).copy_(x, non_blocking=True)
