"""S3 as a torch.optim.Optimizer: groups, schedulers, closures, layouts, dtypes, devices, statistics."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from s3_megatron.optim import EXP_AVG, EXP_AVG_ROOT, S3
from s3_megatron.optim.reference import s3_reference_step
from tests.tensors import bits


def parameter(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def gradients(like: Tensor, steps: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(like.shape, dtype=torch.float64, generator=generator).to(like.dtype) for _ in range(steps)]


class Oracle:
    """Algorithm 1 beside one parameter of an optimizer, reading that parameter's group as it changes."""

    def __init__(self, param: Tensor) -> None:
        self.x = param.detach().double().clone()
        self.m = self.s = torch.zeros_like(self.x)

    def step(self, grad: Tensor, group: dict) -> None:
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        names = {name: group[name] for name in ("p", "weight_decay", "nesterov")}
        step = s3_reference_step(self.x, grad.double(), self.m, self.s, lr=lr, beta1=beta1, beta2=beta2, **names)
        self.x, self.m, self.s, _ = step


def test_every_group_follows_its_own_hyperparameters():
    params = [parameter(5, seed=i) for i in range(6)]
    optimizer = S3(
        [
            {"params": params[:1]},
            {"params": params[1:3], "beta": 0.8, "lr": 0.3},
            {"params": params[3:4], "betas": (0.9, 0.99), "p": 2, "weight_decay": 0.5},
            {"params": params[4:5], "nesterov": False, "weight_decay": 0.0},
        ],
        lr=0.1,
        beta=0.7,
        p=1.5,
        weight_decay=0.1,
    )
    optimizer.add_param_group({"params": params[5], "beta": 0.5})
    shown = [(*g["betas"], g["p"], g["lr"], g["weight_decay"], g["nesterov"]) for g in optimizer.param_groups]
    assert shown == [
        (0.7, 0.7, 1.5, 0.1, 0.1, True),
        (0.8, 0.8, 1.5, 0.3, 0.1, True),
        (0.9, 0.99, 2, 0.1, 0.5, True),
        (0.7, 0.7, 1.5, 0.1, 0.0, False),
        (0.5, 0.5, 1.5, 0.1, 0.1, True),
    ]
    oracles = [Oracle(x) for x in params]
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    for step in zip(*(gradients(x, 4, seed=i) for i, x in enumerate(params)), strict=True):
        for x, grad, oracle, group in zip(params, step, oracles, groups, strict=True):
            x.grad = grad
            oracle.step(grad, group)
        optimizer.step()
    for x, oracle in zip(params, oracles, strict=True):
        torch.testing.assert_close(x.detach(), oracle.x, rtol=0, atol=1e-12)


def test_named_parameters_are_taken():
    model = nn.Linear(3, 2)
    optimizer = S3(model.named_parameters(), weight_decay=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


SCHEDULERS = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    # Its default cycle_momentum writes the first of the two betas, as it does for Adam.
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=12),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
}


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_set_every_steps_rate(name, lr):
    x = parameter(31)
    # Cloned: a scheduler fills a tensor in place.
    optimizer = S3([x], lr=lr.clone() if isinstance(lr, Tensor) else lr, weight_decay=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    oracle, rates, betas = Oracle(x), set(), set()
    for grad in gradients(x, 10):
        group = optimizer.param_groups[0]
        rates.add(round(float(group["lr"]), 9))
        betas.add(group["betas"])
        x.grad = grad
        oracle.step(grad, group)
        optimizer.step()
        scheduler.step()
        torch.testing.assert_close(x.detach(), oracle.x, rtol=0, atol=1e-12)
    assert len(rates) > 5
    assert (len(betas) > 5) == (name == "one-cycle")


def test_a_closure_is_called_once_with_gradients_enabled_and_its_loss_returned():
    x = parameter(3)
    optimizer = S3([x], lr=0.1, weight_decay=0.1)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    before = x.detach().clone()
    assert optimizer.step(closure).item() == before.square().sum().item()
    assert calls == [True]
    assert (x.abs() < before.abs()).all()
    assert optimizer.step() is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    x = parameter(3)
    optimizer = S3([x], lr=0.1, weight_decay=0.1)
    x.grad = torch.ones_like(x)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert x.grad is None if set_to_none else not x.grad.any()


def test_a_zero_gradient_decays_once_a_step_and_no_gradient_not_at_all():
    """The update is 0 before any gradient came, and the decay is applied alone: once, and decoupled from the state."""
    touched, untouched, frozen = parameter(3), parameter(3), parameter(3).requires_grad_(False)
    optimizer = S3([{"params": [touched, untouched, frozen]}, {"params": [parameter(2)]}], lr=0.1, weight_decay=0.2)
    before = [t.detach().clone() for t in (touched, untouched, frozen)]
    for _ in range(5):
        touched.grad = torch.zeros_like(touched)
        optimizer.step()
    torch.testing.assert_close(touched.detach(), before[0] * (1 - 0.1 * 0.2) ** 5, rtol=1e-15, atol=0)
    assert torch.equal(untouched, before[1]) and torch.equal(frozen, before[2])
    assert list(optimizer.state) == [touched]
    assert not optimizer.state[touched][EXP_AVG].any()


def test_maximize_climbs_and_still_decays():
    down, up = parameter(31), parameter(31)
    minimizer = S3([down], lr=0.1, weight_decay=0.1)
    maximizer = S3([up], lr=0.1, weight_decay=0.1, maximize=True)
    for grad in gradients(down, 4):
        down.grad, up.grad = -grad, grad
        minimizer.step()
        maximizer.step()
    assert torch.equal(bits(up), bits(down))


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "strided": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "expanded": lambda t: t.mean(dim=0, keepdim=True).expand_as(t),
}


@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_param", ["contiguous", "transposed", "channels_last", "strided"])
def test_the_memory_layout_changes_nothing(of_param, of_grad):
    """To 1e-6: vectorised and scalar pow may differ by a ULP of float32, on updates of at most 1 times lr = 0.1."""
    plain = parameter(4, 3, 5, 2, dtype=torch.float32)
    odd = LAYOUTS.get(of_param, Tensor.contiguous)(plain.detach().clone()).requires_grad_()
    assert odd.is_contiguous() == (of_param == "contiguous")
    optimizers = [S3([x], lr=0.1, weight_decay=0.1) for x in (plain, odd)]
    for grad in gradients(plain, 4):
        odd.grad = LAYOUTS[of_grad](grad)
        plain.grad = odd.grad.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(odd, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1,), (4097,)])
def test_any_shape_and_an_empty_one_beside_it(shape):
    x, empty = parameter(*shape), parameter(0, 3)
    optimizer, oracle = S3([empty, x], lr=0.1, weight_decay=0.1), Oracle(x)
    optimizer.update_statistics = torch.zeros(5, dtype=torch.float64)
    for grad in gradients(x, 3):
        x.grad, empty.grad = grad, torch.zeros_like(empty)
        oracle.step(grad, optimizer.param_groups[0])
        optimizer.step()
    torch.testing.assert_close(x.detach(), oracle.x, rtol=0, atol=1e-12)
    assert optimizer.state[empty][EXP_AVG].shape == (0, 3)


STATE_DTYPES = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


@pytest.mark.parametrize("dtype", STATE_DTYPES)
def test_low_precision_weights_have_float32_state_and_are_rounded_once(dtype):
    """From the same state and weight, a bfloat16 or float16 weight is the float32 one rounded: no bit more or less."""
    low = parameter(4097, dtype=dtype)
    for_low = S3([low], lr=0.1, weight_decay=0.1)
    for grad in gradients(low, 4):
        wide = low.detach().to(STATE_DTYPES[dtype]).requires_grad_()
        for_wide = S3([wide], lr=0.1, weight_decay=0.1)
        for_wide.state[wide] = {name: t.clone() for name, t in for_low.state[low].items()}
        low.grad, wide.grad = grad, grad.to(wide.dtype)
        for_low.step()
        for_wide.step()
        assert torch.equal(bits(low), bits(wide.to(dtype)))
    for name in (EXP_AVG, EXP_AVG_ROOT):
        assert for_low.state[low][name].dtype == STATE_DTYPES[dtype]
    assert set(for_low.state[low]) == {EXP_AVG, EXP_AVG_ROOT}  # two numbers a parameter, no step counter


def test_allocate_state_reserves_zeros_and_keeps_what_exists():
    """For engines that must know every tensor before the first step, parameters without gradient included."""
    stepped, waiting, half = parameter(3), parameter(2, 3), parameter(4, dtype=torch.bfloat16)
    optimizer = S3([{"params": [stepped]}, {"params": [waiting, half]}], lr=0.1, weight_decay=0.1)
    stepped.grad = torch.ones_like(stepped)
    optimizer.step()
    kept = bits(optimizer.state[stepped][EXP_AVG_ROOT])
    optimizer.allocate_state()
    assert torch.equal(bits(optimizer.state[stepped][EXP_AVG_ROOT]), kept)
    for x in (waiting, half):
        for name in (EXP_AVG, EXP_AVG_ROOT):
            state = optimizer.state[x][name]
            assert state.shape == x.shape and state.dtype == STATE_DTYPES[x.dtype]
            assert not state.any() and not state.requires_grad


def test_update_statistics_are_the_last_steps():
    """Over groups and dtypes together; low-precision weights count with the update before it is rounded."""
    params = [parameter(7, dtype=dtype, seed=i) for i, dtype in enumerate(STATE_DTYPES)]
    params += [parameter(0), parameter(5), parameter(5)]  # the last one gets no gradient
    optimizer = S3([{"params": params[:2]}, {"params": params[2:], "p": 1.5}], lr=1.0, weight_decay=0.1)
    optimizer.update_statistics = torch.full((5,), 99.0, dtype=torch.float64)
    oracles = [Oracle(x) for x in params]
    # The second step is the smaller one: what the first left behind would show.
    for size, sign in ((1.0, 1), (0.2, -1)):
        expected = []
        for i, (x, oracle) in enumerate(zip(params[:-1], oracles, strict=False)):
            x.grad = torch.full_like(x, sign * size * (i + 1))
            before = oracle.x * 0.9
            oracle.step(x.grad, optimizer.param_groups[i > 1])
            expected.append((before - oracle.x).abs())
        optimizer.step()
        update = torch.cat(expected)
        # Signs agree but in the second step, whose gradient is too small to turn m.
        agreeing = update.numel() if sign > 0 else 0
        expected = torch.tensor([update.sum(), update.max(), (update > 0.9).sum(), agreeing, update.numel()])
        torch.testing.assert_close(optimizer.update_statistics, expected.double(), rtol=1e-6, atol=0)


def test_without_statistics_none_are_kept():
    x = parameter(3)
    optimizer = S3([x], lr=0.1, weight_decay=0.1)
    x.grad = torch.ones_like(x)
    optimizer.step()
    assert optimizer.update_statistics is None and S3.update_statistics is None


def test_meta_parameters_get_meta_state():
    """A dry run without memory: shapes and dtypes are right, and no value is ever read."""
    x = torch.empty(1_000_000, 1_000_000, device="meta", dtype=torch.bfloat16, requires_grad=True)
    optimizer = S3([x], lr=torch.tensor(0.1, device="meta"), weight_decay=0.1)
    x.grad = torch.empty_like(x)
    optimizer.step()
    state = optimizer.state[x][EXP_AVG_ROOT]
    assert state.is_meta and state.shape == x.shape and state.dtype == torch.float32


def test_training_is_deterministic_and_learns():
    """Two runs from one seed are equal to the last bit; the loss of a small regression falls to a hundredth."""

    def train() -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
        data = torch.randn(64, 8)
        target = data.sin().sum(dim=1, keepdim=True)
        optimizer = S3(model.parameters(), lr=0.02, weight_decay=0.01)
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=300)
        losses = []
        for _ in range(300):
            optimizer.zero_grad()
            loss = (model(data) - target).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        return losses, [bits(x) for x in model.parameters()]

    losses, weights = train()
    again, same_weights = train()
    assert losses == again and all(map(torch.equal, weights, same_weights))
    assert math.isfinite(losses[-1]) and losses[-1] < losses[0] / 100
