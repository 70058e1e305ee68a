"""The size of Adam's update, read from its state, is the distance that its step moved the weights."""

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn

from s3_megatron.watch import updates
from s3_megatron.watch.statistics import ELEMENTS, FIELDS, LARGEST
from s3_megatron.watch.updates import adam_statistics


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_adams_update_is_what_moved_the_weights(kind: type[torch.optim.Optimizer], amsgrad: bool) -> None:
    """In float64 and with a rate of 1, so that rounding the weight hides nothing; decay off, since it is left out."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((5, 3), (7,), (0,))]
    groups = [{"params": params[:1]}, {"params": params[1:], "betas": (0.5, 0.9)}]
    optimizer = kind(groups, lr=1.0, weight_decay=0.0, amsgrad=amsgrad)
    for step in range(3):
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = torch.randn_like(param) * 0.1**step  # smaller: amsgrad keeps its denominator
        optimizer.step()
    moved = torch.cat([(a - b).abs().flatten() for a, b in zip(before, params, strict=True)]).detach()
    torch.testing.assert_close(
        adam_statistics(optimizer)[:2], torch.stack([moved.sum(), moved.max()]), rtol=1e-9, atol=0.0
    )


def test_adams_update_exceeds_1_and_is_seen_to() -> None:
    """Theorem 1: |m|/sqrt(v) reaches 7.27 at (0.9, 0.999); here after silence and one burst."""
    param = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([param], lr=1.0, betas=(0.9, 0.999), eps=0.0, weight_decay=0.0)
    for step in range(3000):
        param.grad = torch.full((1,), 1e-6 if step < 2988 else 1.0)
        optimizer.step()
    assert adam_statistics(optimizer)[LARGEST] > 5.0


# Apex's and DeepSpeed's, which need a GPU: their names are what is looked at, and their state is Adam's.
LAMBS = [type(name, (torch.optim.Adam,), {}) for name in ("FusedLAMB", "FusedLamb")]
# Those of another library that keep Adam's state, or have its betas and one more.
RIVALS = [getattr(pytorch_optimizer, name) for name in ("ADOPT", "StableAdamW", "Lamb", "AdaBound", "Adan", "AdEMAMix")]
TORCHS = [torch.optim.SGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax]


@pytest.mark.parametrize("kind", [*TORCHS, *LAMBS, *RIVALS])
def test_optimizers_of_another_kind_count_as_nothing(kind: type[torch.optim.Optimizer]) -> None:
    """Of NAdam and RAdam, which keep Adam's state, the size of Adam's update was given out as theirs; Adamax was a
    KeyError, and SGD moved by 0. Then others did the same under names that were not excluded: of ADOPT a fifth of the
    true mean was written, and Adan's three betas ended the run."""
    param = nn.Parameter(torch.ones(3))
    optimizer = kind([param], lr=0.1)
    param.grad = torch.ones(3)
    optimizer.step()
    assert adam_statistics(optimizer).tolist() == [0.0] * len(FIELDS)


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}])
def test_however_adam_keeps_its_step_and_however_large_a_weight_is(settings: dict, monkeypatch) -> None:
    """Fused AdamW counts in tensors on the weights' device; states are looked at in parts, the last of
    which is short. Float32 arithmetic of four roundings, against float64: 1e-6."""
    monkeypatch.setattr(updates, "_AT_ONCE", 10)
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(7, 3))
    optimizer = torch.optim.AdamW([param], **settings)
    for _ in range(3):
        param.grad = torch.randn_like(param)
        optimizer.step()
    state = optimizer.state[param]
    mean, square = (state[name].double() / (1 - beta**3) for name, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999)))
    wanted = (mean / (square.sqrt() + 1e-8)).abs()
    torch.testing.assert_close(
        adam_statistics(optimizer)[:2], torch.stack([wanted.sum(), wanted.max()]), rtol=1e-6, atol=0.0
    )


def test_an_adam_without_bias_correction_is_read_without() -> None:
    """DeepSpeed's and Apex's have the setting; the update was given out as 3.2 times what it was in the first step.
    Their state after one gradient of 1, which torch's Adam has too, is moved by 0.1 / (sqrt(0.001) + eps)."""
    param = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.Adam([{"params": [param], "bias_correction": False}])
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert adam_statistics(optimizer)[LARGEST] == pytest.approx(0.1 / (0.001**0.5 + 1e-8), rel=1e-12)


class FusedAdam(torch.optim.AdamW):
    """Keeps its states as TransformerEngine's does with ``exp_avg_dtype=torch.float16``: in units of their scales."""

    def step(self) -> None:
        super().step()
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[f"{name} scale"] = scale = state[name].abs().max() / 30000
                state[name] = (state[name] / scale).half()

    def get_unscaled_state(self, param: Tensor, name: str) -> Tensor:
        return self.state[param][name].float() * self.state[param][f"{name} scale"]


def test_states_with_a_scale_are_read_in_their_own_unit() -> None:
    """Of states in float16 the numbers as stored were taken: a mean |update| of hundreds. Half precision keeps 2^-11
    of each state."""
    torch.manual_seed(0)
    values = torch.randn(2, 50)
    params = [nn.Parameter(values[0].clone()) for _ in range(2)]
    optimizers = [torch.optim.AdamW([params[0]]), FusedAdam([params[1]])]
    for param, optimizer in zip(params, optimizers, strict=True):
        param.grad = values[1].sign() * (1 + values[1].abs())
        optimizer.step()
    plain, scaled = map(adam_statistics, optimizers)
    torch.testing.assert_close(scaled[:2], plain[:2], rtol=2**-9, atol=0.0)


def test_a_state_without_a_step_has_moved_nothing() -> None:
    """Megatron makes Adam's state before the first step, and so has a weight without a gradient: 0 of 0 is NaN."""
    params = [nn.Parameter(torch.randn(3)) for _ in range(2)]
    optimizer = torch.optim.AdamW(params)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    alone = adam_statistics(optimizer)[:2] / torch.tensor([2, 1])
    state = optimizer.state[params[1]]
    for name in ("step", "exp_avg", "exp_avg_sq"):
        state[name].zero_()
    assert torch.equal(adam_statistics(optimizer)[:2], alone) and adam_statistics(optimizer)[ELEMENTS] == 3


def test_states_whose_groups_are_empty_are_counted() -> None:
    """ZeRO-3 fills the param groups only while it steps: of Adam there an |update| of 0 was written."""
    params = [nn.Parameter(torch.randn(3)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [param]} for param in params])
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    wanted = adam_statistics(optimizer)
    for group in optimizer.param_groups:
        group["params"] = []
    torch.testing.assert_close(adam_statistics(optimizer), wanted, rtol=0, atol=0, equal_nan=True)
    optimizer.param_groups[1]["betas"] = (0.5, 0.5)
    assert adam_statistics(optimizer).tolist() == [0.0] * len(FIELDS), "whose betas they are is not known"
