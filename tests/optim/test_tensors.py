"""Tensors whose bytes are not their value, and other ways that a state comes in: as AdamW, or refused in one line."""

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map

from s3_megatron.errors import S3Error
from s3_megatron.optim import EXP_AVG, EXP_AVG_ROOT, S3


class Wrapped(Tensor):
    """As quantized training weights are: the value lives in another tensor, which operations reach by dispatch."""

    @staticmethod
    def __new__(cls, value: Tensor) -> "Wrapped":
        return Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=value.device)

    def __init__(self, value: Tensor) -> None:
        self.value = value

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def bare(t):
            return t.value if isinstance(t, Wrapped) else t

        out = func(*tree_map(bare, args), **tree_map(bare, kwargs or {}))
        if func._schema.is_mutable:
            return args[0] if func._schema.returns else None
        return tree_map(lambda t: Wrapped(t) if isinstance(t, Tensor) else t, out)


def step(param: Tensor, grad: Tensor, **settings: object) -> Tensor:
    param = nn.Parameter(param)
    param.grad = grad
    S3([param], lr=0.1, weight_decay=0.1, **settings).step()
    return param


def expected(**settings: object) -> Tensor:
    return step(torch.ones(4), torch.full((4,), 2.0), **settings).detach()


def test_a_gradient_with_the_negative_bit_moves_its_weight_down_the_slope() -> None:
    """Incident: autograd makes such gradients of complex numbers, and the C++ loop moved the weight UP the slope."""
    assert torch.equal(step(torch.ones(4), torch._neg_view(torch.full((4,), -2.0))), expected())


@pytest.mark.parametrize("wrap", [Wrapped, lambda x: TwoTensor(x, x.clone())], ids=["quantized", "TwoTensor"])
def test_a_wrapper_subclass_moves_as_the_tensor_in_it(wrap) -> None:
    """Incident: it did not move at all: the C++ loop wrote to an address that was not its value's."""
    moved = step(wrap(torch.ones(4)), wrap(torch.full((4,), 2.0)))
    value = moved.value if isinstance(moved, Wrapped) else moved.a
    torch.testing.assert_close(value.detach(), expected(implementation="foreach"), rtol=0, atol=0)


def test_a_wrapper_among_plain_weights_sends_no_other_to_foreach() -> None:
    plain, wrapped = nn.Parameter(torch.ones(4)), nn.Parameter(Wrapped(torch.ones(4)))
    plain.grad, wrapped.grad = torch.full((4,), 2.0), Wrapped(torch.full((4,), 2.0))
    S3([wrapped, plain], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(plain, expected(implementation="cpu"))
    torch.testing.assert_close(wrapped.value, plain.detach(), rtol=1e-6, atol=0)


def test_what_was_asked_for_and_cannot_take_a_tensor_is_refused() -> None:
    with pytest.raises(S3Error, match="Wrapped is no plain tensor"):
        step(Wrapped(torch.ones(4)), Wrapped(torch.ones(4)), implementation="cpu")


def test_fake_tensors_step() -> None:
    """Incident: memory estimates under FakeTensorMode ended in a segmentation fault."""
    with FakeTensorMode():
        model = nn.Linear(300, 300)
        optimizer = S3(model.parameters(), lr=0.1, weight_decay=0.1)
        model(torch.ones(2, 300)).sum().backward()
        optimizer.step()
        assert optimizer.state[model.weight][EXP_AVG].shape == (300, 300)


def refused() -> Iterator[tuple[str, Tensor, Tensor, str]]:
    yield "expanded", torch.ones(1).expand(4), torch.ones(4), "several elements in one place"
    yield "sparse", torch.ones(2, 2), torch.ones(2, 2).to_sparse(), "sparse=False"
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    yield "freed", freed, torch.ones(4), "longer than its storage"


@pytest.mark.parametrize(("param", "grad", "message"), [case[1:] for case in refused()], ids=[c[0] for c in refused()])
@pytest.mark.parametrize("implementation", ["auto", "foreach"])
def test_what_nothing_can_move_is_refused_in_one_line(param, grad, message, implementation) -> None:
    with pytest.raises(S3Error, match=message) as caught:
        step(param, grad, implementation=implementation)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("implementation", ["auto", "foreach"])
def test_a_weight_swapped_for_another_size_is_refused(implementation) -> None:
    """``param.data = ...`` after a step: the C++ loop counted by the weight and read past the end of m."""
    param = nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    optimizer = S3([param], lr=0.1, weight_decay=0.1, implementation=implementation)
    optimizer.step()
    param.data = torch.ones(40_000)
    param.grad = torch.ones(40_000)
    with pytest.raises(S3Error, match=r"weight of shape \[40000\] has a m of shape \[4\]"):
        optimizer.step()
    assert torch.equal(param, torch.ones(40_000))


def test_a_weight_in_two_places_at_once_moves_as_by_foreach() -> None:
    """Two parameters over one memory: threads of the C++ loop would race for it."""

    def run(implementation: str) -> Tensor:
        base = torch.arange(1.0, 9.0)
        params = [nn.Parameter(base), nn.Parameter(base[2:6])]
        for param in params:
            param.grad = torch.ones_like(param)
        S3(params, lr=0.1, weight_decay=0.1, implementation=implementation).step()
        return base

    assert torch.equal(run("auto"), run("foreach"))


def test_a_model_cast_after_the_optimizer_was_made_steps() -> None:
    """``model.bfloat16()`` writes ``param.data``: the same object, another dtype and address."""
    model = nn.Linear(8, 8)
    optimizer = S3(model.parameters(), lr=0.1, weight_decay=0.1)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model.to(dtype)
        before = model.weight.detach().clone()
        model(torch.ones(2, 8, dtype=dtype)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert model.weight.isfinite().all() and not torch.equal(model.weight, before)


def trained(**settings: object) -> tuple[nn.Parameter, S3]:
    param = nn.Parameter(torch.ones(4))
    param.grad = torch.full((4,), 2.0)
    optimizer = S3([param], lr=0.1, weight_decay=0.1, **settings)
    optimizer.step()
    return param, optimizer


def test_a_state_that_came_past_load_state_dict_is_looked_at() -> None:
    """Incident: ZeroRedundancyOptimizer put Adam's v where r belongs, and its betas into the groups, unnoticed."""
    param, optimizer = trained()
    adam = torch.optim.AdamW([param])
    adam.step()
    optimizer.state[param] = copy.deepcopy(adam.state[param])
    with pytest.raises(S3Error, match="was not written by S3"):
        optimizer.step()
    optimizer.state[param] = {EXP_AVG: torch.zeros(4)}
    with pytest.raises(S3Error, match="exp_avg and exp_avg_sq"):
        optimizer.step()


def test_hooks_come_before_the_state_is_looked_at() -> None:
    """A pre-hook may be what turns a foreign state into S3's; and a state that it spoils is refused."""
    param, optimizer = trained(state_dtype=torch.bfloat16)
    saved = optimizer.state_dict()
    unmarked = copy.deepcopy(saved)
    mark = unmarked["param_groups"][0].pop("s3_state")
    seen = []
    with_mark = [{**unmarked["param_groups"][0], "s3_state": mark}]
    handle = optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, "param_groups": with_mark})
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[param][EXP_AVG_ROOT].dtype))
    optimizer.load_state_dict(unmarked)
    assert seen == [torch.bfloat16]
    handle.remove()
    optimizer.register_load_state_dict_pre_hook(lambda _, state: unmarked)
    with pytest.raises(S3Error, match="was not written by S3"):
        optimizer.load_state_dict(saved)


def test_an_older_s3s_groups_get_what_they_lack_and_bad_values_are_refused() -> None:
    """Incident: a state without a key that S3 has now was loaded, and failed in the next step."""
    _, optimizer = trained()
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["rounding_seed"]
    optimizer.load_state_dict(saved)
    optimizer.step()
    saved["param_groups"][0]["p"] = float("nan")
    with pytest.raises(S3Error, match="p is nan"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["p"] == 3.0


def test_who_captured_keeps_the_tensors_that_a_graph_reads() -> None:
    _, plain = trained()
    _, capturing = trained(capturable=True)
    rate = capturing.param_groups[0]["lr"]
    saved = plain.state_dict()
    saved["param_groups"][0]["lr"] = 0.25
    capturing.load_state_dict(saved)
    assert capturing.param_groups[0]["lr"] is rate and rate == 0.25


@pytest.mark.parametrize("name", ["foreach", "fused", "differentiable", "eps", "amsgrad"])
def test_an_argument_that_s3_has_not_is_refused_with_those_it_has(name) -> None:
    with pytest.raises(TypeError, match=f"no argument '{name}'; it has lr, beta, p, weight_decay"):
        S3([torch.zeros(1, requires_grad=True)], **{name: True})


@pytest.mark.parametrize(("lr", "works"), [([0.1], True), ([0.1, 0.2], False), ([], False)])
def test_a_rate_in_a_tensor_is_one_number(lr, works) -> None:
    """Incident: several were a RuntimeError about the truth of a tensor."""
    if works:
        for shape, implementation in itertools.product([(), (3,)], ["auto", "foreach"]):
            param = step_with(torch.ones(shape), torch.tensor(lr), implementation)
            assert param.shape == shape and (param < 1).all()
    else:
        with pytest.raises(S3Error, match="must be one number"):
            step_with(torch.ones(3), torch.tensor(lr), "auto")


def step_with(value: Tensor, lr: Tensor, implementation: str) -> Tensor:
    param = nn.Parameter(value)
    param.grad = torch.ones_like(param)
    S3([param], lr=lr, weight_decay=0.1, implementation=implementation).step()
    return param
