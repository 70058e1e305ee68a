"""S3's state: saved, loaded, copied, and distinguished from Adam's."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.optim import EXP_AVG, EXP_AVG_ROOT, S3, from_adam_state, is_s3_state
from s3_megatron.optim.reference import s3_reference_step
from tests.tensors import through_a_file, train

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def parameters(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in ((3, 5), (0,), (97,))]


def build(params: list[Tensor], lr: float | Tensor = 0.1) -> S3:
    return S3([{"params": params[:2]}, {"params": params[2:], "beta": 0.9, "p": 1.5}], lr=lr, weight_decay=0.1)


def bits(tensors: list[Tensor]) -> bytes:
    return b"".join(t.detach().clone().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)


def everything(params: list[Tensor], optimizer: torch.optim.Optimizer) -> bytes:
    states = [optimizer.state[x][name] for x in params for name in (EXP_AVG, EXP_AVG_ROOT)]
    return bits([*params, *states])


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_saving_and_loading_in_the_middle_equals_no_interruption(dtype, lr):
    """Bit for bit. torch alone would round float32 state to the dtype of bfloat16 and float16 parameters on load."""
    params = parameters(dtype)
    optimizer = build(params, lr)
    train(params, optimizer, range(4))
    saved = through_a_file({"weights": [x.detach() for x in params], "optimizer": optimizer.state_dict()})

    resumed = [x.clone().requires_grad_() for x in saved["weights"]]
    # Other hyperparameters than the saved ones, which must win.
    loaded = S3([{"params": resumed[:2]}, {"params": resumed[2:]}], lr=9.0, beta=0.1, p=8, nesterov=False)
    loaded.load_state_dict(saved["optimizer"])
    assert everything(resumed, loaded) == everything(params, optimizer)
    assert loaded.state[resumed[0]][EXP_AVG].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    train(params, optimizer, range(4, 8))
    train(resumed, loaded, range(4, 8))
    assert everything(resumed, loaded) == everything(params, optimizer)


def test_other_hyperparameters_than_the_saved_ones_are_warned_of_once(caplog: pytest.LogCaptureFixture):
    """Configured with 0.95 and 3, a run silently went on with 0.9 and 2; Megatron refuses that, and DeepSpeed."""
    params = parameters(torch.float32)
    source = S3(params, beta=0.9, p=2.25)
    train(params, source, range(1))
    for _ in range(2):
        optimizer = S3(params)
        optimizer.load_state_dict(source.state_dict())
        assert (optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["p"]) == ((0.9, 0.9), 2.25)
    (line,) = caplog.messages
    assert (
        "S3 with betas=(0.9, 0.9), p=2.25 and this run asks for betas=(0.95, 0.95), p=3.0" in line and "\n" not in line
    )
    source.load_state_dict(source.state_dict())
    assert len(caplog.messages) == 1


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_goes_on_alike_and_apart(way, dtype):
    params = parameters(dtype)
    optimizer = build(params)
    train(params, optimizer, range(3))
    before = everything(params, optimizer)
    twin_params, twin = COPIES[way]((params, optimizer))
    train(twin_params, twin, range(3, 6))
    assert everything(params, optimizer) == before
    train(params, optimizer, range(3, 6))
    assert everything(twin_params, twin) == everything(params, optimizer) != before


def test_loading_again_and_again_leaves_the_param_groups_their_keys():
    """Incident: the second load put torch's "differentiable" into every group. torch.distributed.checkpoint then found
    a key in a run that had resumed twice which no fresh run has, and its tests of FSDP2 and DDP failed with S3 alone.

    What such a run has saved loses it again.
    """
    params = parameters(torch.float32)
    optimizer = build(params)
    train(params, optimizer, range(1))
    keys = [list(group) for group in optimizer.state_dict()["param_groups"]]
    for copied in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for _ in range(3):
            copied.load_state_dict(through_a_file(copied.state_dict()))
        assert [list(group) for group in copied.state_dict()["param_groups"]] == keys
    state = optimizer.state_dict()
    state["param_groups"][0]["differentiable"] = False
    optimizer.load_state_dict(state)
    assert [list(group) for group in optimizer.state_dict()["param_groups"]] == keys


def test_parameters_that_had_no_state_yet_load_without():
    params, others = parameters(torch.bfloat16), parameters(torch.bfloat16)
    optimizer, loaded = build(params), build(others)
    params[2].grad = torch.ones_like(params[2])
    optimizer.step()
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert list(loaded.state) == [others[2]]
    assert loaded.state[others[2]][EXP_AVG].dtype == torch.float32


def test_an_adam_state_is_refused_and_nothing_changes():
    """Incident class: the same two names, another meaning: v where r belongs would make each update wild, silently."""
    params = parameters(torch.float32)
    adam = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}], weight_decay=0.1)
    train(params, adam, range(3))
    optimizer = build(params)
    train(params, optimizer, range(2))
    before = everything(params, optimizer)
    assert not is_s3_state(adam.state_dict()["param_groups"])
    with pytest.raises(S3Error, match=r"was not written by S3.*from_adam_state"):
        optimizer.load_state_dict(adam.state_dict())
    assert everything(params, optimizer) == before


def test_an_adam_state_that_came_past_load_state_dict_is_refused_at_the_step():
    """A program that puts states into the optimizer itself would have v taken for r, in silence."""
    params = parameters(torch.float32)
    adam, optimizer = torch.optim.AdamW(params, weight_decay=0.1), build(params)
    train(params, adam, range(3))
    optimizer.state.update(adam.state)
    before = bits(params)
    with pytest.raises(S3Error, match=r"was not written by S3 \(it has step, exp_avg, exp_avg_sq\); an Adam state"):
        optimizer.step()
    assert bits(params) == before


def test_one_unmarked_group_is_enough_to_refuse():
    params = parameters(torch.float32)
    optimizer = build(params)
    train(params, optimizer, range(1))
    assert is_s3_state(optimizer.state_dict()["param_groups"])
    state = optimizer.state_dict()
    del state["param_groups"][1]["s3_state"]
    with pytest.raises(S3Error, match="was not written by S3"):
        optimizer.load_state_dict(state)


def test_another_number_of_parameters_is_refused():
    params = parameters(torch.float32)
    with pytest.raises(ValueError, match="doesn't match the size"):
        build(params).load_state_dict(build(params[1:]).state_dict())


@pytest.mark.parametrize("p", [1, 2, 3])
def test_a_converted_adam_state_goes_on_as_the_oracle_from_that_m_and_s(p):
    """m is Adam's, and r = sqrt(v) stands for s = v^(p/2): the same scale of gradient at every p.

    Adam's betas (.9, .999) let |m| exceed sqrt(v), so the first updates after the change may be above 1 by
    Algorithm 1; S3's clamp keeps its promise of at most lr a step.
    """
    params = [x.detach().double().requires_grad_() for x in parameters(torch.float32)]
    adam = torch.optim.AdamW([{"params": params[:2], "lr": 0.7}, {"params": params[2:]}], lr=0.5, weight_decay=0.3)
    train(params, adam, range(20))
    untouched = copy.deepcopy(adam.state_dict())
    optimizer = S3([{"params": params[:2]}, {"params": params[2:], "beta": 0.9}], lr=0.1, p=p, weight_decay=0.1)
    oracle = [(x.detach().clone(), adam.state[x]["exp_avg"], adam.state[x]["exp_avg_sq"] ** (p / 2)) for x in params]
    optimizer.load_state_dict(through_a_file(from_adam_state(adam.state_dict(), optimizer)))
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1]
    assert [g["betas"] for g in optimizer.param_groups] == [(0.95, 0.95), (0.9, 0.9)]
    for x, (_, m, s) in zip(params, oracle, strict=True):
        assert set(optimizer.state[x]) == {EXP_AVG, EXP_AVG_ROOT}
        assert torch.equal(optimizer.state[x][EXP_AVG], m)
        torch.testing.assert_close(optimizer.state[x][EXP_AVG_ROOT] ** p, s, rtol=1e-12, atol=0)

    train(params, optimizer, range(20, 21))
    above_one = 0
    for x, (weight, m, s), beta in zip(params, oracle, (0.95, 0.95, 0.9), strict=True):
        *_, update = s3_reference_step(weight, x.grad, m, s, lr=0.1, beta1=beta, beta2=beta, p=p)
        above_one += int((update.abs() > 1).sum())
        expected = weight - 0.1 * (update.clamp(-1, 1) + 0.1 * weight)
        torch.testing.assert_close(x.detach(), expected, rtol=0, atol=1e-12)
    assert above_one > 0
    # What was converted is still Adam's own.
    after = adam.state_dict()
    assert after["param_groups"] == untouched["param_groups"]
    for index, entry in untouched["state"].items():
        assert all(torch.equal(after["state"][index][name], t) for name, t in entry.items())


@pytest.mark.parametrize("implementation", ["auto", "foreach"])
@pytest.mark.parametrize("p", [1.5, 2, 3])
def test_the_bound_holds_where_adams_m_exceeds_its_root(implementation, p):
    """Adam (.9, .999) reaches |m| = 7.27 sqrt(v). Taken over, Algorithm 1's update would be above 1; S3 cuts it, and
    the excess fades: with c = |m|/r and q = p/(p-1), Hoelder gives c'^q - 1 <= beta (c^q - 1), whatever the gradient.
    These gradients are the ones for which that is an equality. 1e-3 is 100 roundings of float32, in m and r, many
    times over.
    """
    beta, decay, lr, q = 0.95, 0.1, 1e-2, p / (p - 1)
    weight = torch.nn.Parameter(torch.ones(40))
    optimizer = S3([weight], lr=lr, beta=beta, p=p, weight_decay=decay, implementation=implementation)
    adam = torch.optim.AdamW([weight], lr=lr)
    weight.grad = torch.ones(40)
    adam.step()
    adam.state[weight]["exp_avg"].fill_(7.27)
    adam.state[weight]["exp_avg_sq"].fill_(1.0)
    optimizer.load_state_dict(from_adam_state(adam.state_dict(), optimizer))
    m, r = (optimizer.state[weight][name] for name in (EXP_AVG, EXP_AVG_ROOT))
    for step in range(1, 101):
        before, ratio = weight.detach().clone(), m / r
        # Equality in Hoelder's inequality; r is the unit of the gradient.
        weight.grad = r * ratio ** (-1 / (p - 1))
        optimizer.step()
        update = ((1 - lr * decay) * before - weight.detach()) / lr
        # The weight is about 1 and moves by 1e-2: half a unit of its last place is 6e-6 of that.
        assert 0 < update.min() and update.max() <= 1 + 1e-5
        if step == 1:
            torch.testing.assert_close(update, torch.ones(40), rtol=0, atol=1e-5)
    excess = float((m / r)[0]) ** q - 1
    assert excess == pytest.approx(beta**100 * (7.27**q - 1), rel=1e-3)
