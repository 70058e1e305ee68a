"""S3's options beyond the hyperparameters: the states' dtype and rounding, the kernel, steps that can be captured."""

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from s3_megatron.errors import S3Error
from s3_megatron.optim import EXP_AVG, EXP_AVG_ROOT, S3, SoftMuon, SoftSignum

BRAIN = torch.bfloat16


def trained(steps: int = 3, **options) -> tuple[torch.nn.Parameter, S3]:
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(4097))
    optimizer = S3([param], lr=0.1, weight_decay=0.1, **options)
    train(param, optimizer, steps)
    return param, optimizer


def train(param: Tensor, optimizer: S3, steps: int) -> None:
    for _ in range(steps):
        param.grad = torch.randn(4097)
        optimizer.step()


def states(optimizer: S3) -> list[Tensor]:
    return [entry[name] for entry in optimizer.state.values() for name in (EXP_AVG, EXP_AVG_ROOT)]


def test_bfloat16_states_take_half_the_memory_and_keep_the_bound():
    """m and r rounded alike keep |u| <= 1; the run stays by the float32 one: 3 steps of 0.1, each off by 2^-8."""
    (wide, _), (param, optimizer) = trained(), trained(state_dtype=BRAIN)
    assert [state.dtype for state in states(optimizer)] == [BRAIN, BRAIN]
    torch.testing.assert_close(param, wide, rtol=0, atol=3 * 0.1 * 2**-8)
    assert not torch.equal(param, wide)


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_a_run_with_bfloat16_states_goes_on_from_a_copy_to_the_bit(seed, way):
    """The noise's seed counts on from where it was: it is in the param groups."""
    param, optimizer = trained(state_dtype=BRAIN, rounding_seed=seed)
    if way == "state_dict":
        twin = torch.nn.Parameter(param.detach().clone())
        other = S3([twin], lr=0.1, weight_decay=0.1, state_dtype=BRAIN, rounding_seed=seed)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        other = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        (twin,) = other.param_groups[0]["params"]
    for x, opt in ((param, optimizer), (twin, other)):
        torch.manual_seed(1)
        train(x, opt, 3)
    assert torch.equal(param, twin)
    assert all(torch.equal(a, b) for a, b in zip(states(optimizer), states(other), strict=True))


@pytest.mark.parametrize(("saved", "kept"), [(BRAIN, torch.float32), (torch.float32, BRAIN)])
def test_loading_keeps_the_states_dtype_of_the_optimizer(saved, kept):
    _, source = trained(state_dtype=saved)
    param, target = trained(state_dtype=kept)
    target.load_state_dict(source.state_dict())
    for loaded, original in zip(states(target), states(source), strict=True):
        assert loaded.dtype == kept and torch.equal(loaded, original.to(kept))
    train(param, target, 1)


def test_groups_and_steps_do_not_share_their_noise():
    """Two groups of equal weights and gradients, rounded with one seed, would have equal states."""
    torch.manual_seed(0)
    start, grad = torch.randn(4097), torch.randn(4097)
    groups = [{"params": [torch.nn.Parameter(start.clone())]} for _ in range(2)]
    optimizer = S3(groups, lr=0.1, weight_decay=0.1, state_dtype=BRAIN, rounding_seed=0)
    for group in groups:
        group["params"][0].grad = grad
    optimizer.step()
    first, _, second, _ = states(optimizer)
    assert not torch.equal(first, second)
    seeds = [group["rounding_seed"] for group in optimizer.param_groups]
    optimizer.step()
    assert [group["rounding_seed"] for group in optimizer.param_groups] == [seed + 1 for seed in seeds]


def test_capturable_keeps_rate_and_seed_where_a_graph_reads_them():
    """A scheduler then writes into the tensor; the run is that of numbers. What a GPU captures: tests/gpu."""
    plain, _ = trained(state_dtype=BRAIN, rounding_seed=7, steps=0)
    param, optimizer = trained(state_dtype=BRAIN, rounding_seed=7, capturable=True, steps=0)
    group = optimizer.param_groups[0]
    lr, seed = group["lr"], group["rounding_seed"]
    numbers = S3([plain], lr=0.1, weight_decay=0.1, state_dtype=BRAIN, rounding_seed=7)
    schedules = [torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)) for opt in (optimizer, numbers)]
    for x, opt, schedule in zip((param, plain), (optimizer, numbers), schedules, strict=True):
        torch.manual_seed(1)
        for _ in range(3):
            train(x, opt, 1)
            schedule.step()
    assert group["lr"] is lr and group["rounding_seed"] is seed and seed == 10
    torch.testing.assert_close(param, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [S3, SoftSignum, SoftMuon])
def test_a_step_by_the_hosts_numbers_is_not_captured(monkeypatch, kind):
    """A graph took it in silence and repeated its rate and temperature for ever; torch's Adam refuses it."""
    param = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = kind([param], lr=0.1, **({} if kind is S3 else {"soft_start": 1}))
    param.grad = torch.ones(3, 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(S3Error, match=f"a CUDA graph captures a step of {kind.__name__}") as caught:
        optimizer.step()
    assert ("capturable=True" in str(caught.value)) == (kind is S3)
    assert torch.equal(param, torch.ones(3, 2)) and not optimizer.state
    trained(capturable=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "fast"}, "auto, foreach, cpu, triton"),
        ({"state_dtype": torch.float16}, r"torch.float32 or torch.bfloat16"),
        ({"rounding_seed": 1}, r"state_dtype=torch.bfloat16"),
        ({"implementation": "triton"}, "the tensors are on cpu"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(S3Error, match=message):
        trained(**options)


def test_fully_sharded_parameters_are_moved_as_any_others():
    """Incident: FSDP2 keeps parameters, gradients and states as DTensors, whose address is none: the process died.

    One rank only: what the kernels must not do is read past it. More ranks are the engine's test.
    """
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain = torch.nn.Linear(65, 7)
        sharded = copy.deepcopy(plain)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(sharded, mesh=mesh)
        for model in (plain, sharded):
            torch.manual_seed(1)
            optimizer = S3(model.parameters(), lr=0.1, weight_decay=0.1)
            for _ in range(3):
                model(torch.randn(5, 65)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.full_tensor(), theirs)
    finally:
        torch.distributed.destroy_process_group()
