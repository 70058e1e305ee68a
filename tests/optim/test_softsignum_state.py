"""SoftSignum's state: saved and loaded in both phases, copied, kept apart from others'; and what is refused."""

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from s3_megatron.errors import S3Error
from s3_megatron.kernels.call import SoftRule
from s3_megatron.optim import EXP_AVG, S3, SoftMuon, SoftSignum
from tests.tensors import through_a_file, train

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BRAIN = torch.bfloat16
KEYS = ("steps_taken", "soft_mu", "soft_sigma", "soft_first", "soft_length", "soft_map", "eps", "sign_iters")
RUN: dict[str, Any] = {"total_steps": 10, "soft_start": 0.5}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 5), (0,), (97,))]


def build(params: list[nn.Parameter], lr: float | Tensor = 0.1, **settings: Any) -> SoftSignum:
    groups = [{"params": params[:2]}, {"params": params[2:], "beta": 0.8, "lr": 0.05}]
    return SoftSignum(groups, lr=lr, weight_decay=0.1, **(RUN | settings))


def everything(params: list[nn.Parameter], optimizer: SoftSignum) -> tuple[bytes, list[Any]]:
    tensors = [t.detach() for x in params for t in (x, optimizer.state[x][EXP_AVG])]
    run = [[group[key] for key in KEYS] for group in optimizer.param_groups]
    return b"".join(t.clone().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors), run


# Hard, the step before the first soft one, the one behind it, soft, beyond the end.
MOMENTS = [2, 5, 6, 8, 11]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(dtype: torch.dtype, moment: int) -> None:
    """torch alone would round float32 states to the dtype of bfloat16 and float16 parameters on load."""
    params = parameters(dtype)
    optimizer = build(params)
    train(params, optimizer, range(moment))
    saved = through_a_file({"weights": [x.detach() for x in params], "optimizer": optimizer.state_dict()})
    resumed = [nn.Parameter(x) for x in saved["weights"]]
    loaded = SoftSignum([{"params": resumed[:2]}, {"params": resumed[2:]}], lr=9.0, beta=0.1, nesterov=True, **RUN)
    loaded.load_state_dict(saved["optimizer"])
    assert loaded.state[resumed[0]][EXP_AVG].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for xs, o in ((params, optimizer), (resumed, loaded)):
        train(xs, o, range(moment, 13))
    assert everything(resumed, loaded) == everything(params, optimizer)
    assert optimizer.schedule[3:] == (5, 5, "tanh")


@pytest.mark.parametrize("moment", [2, 8])
@pytest.mark.parametrize("settings", [{}, {"state_dtype": BRAIN, "rounding_seed": 3}], ids=["float32", "stochastic"])
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_goes_on_alike_and_apart(way: Callable[[Any], Any], settings: dict[str, Any], moment: int) -> None:
    params = parameters()
    optimizer = build(params, **settings)
    train(params, optimizer, range(moment))
    before = everything(params, optimizer)
    twin_params, twin = way((params, optimizer))
    train(twin_params, twin, range(moment, 12))
    assert everything(params, optimizer) == before
    train(params, optimizer, range(moment, 12))
    assert everything(twin_params, twin) == everything(params, optimizer) != before


@pytest.mark.parametrize("options", [{}, {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}], ids=str)
@pytest.mark.parametrize("moment", [0, 2, 8])
def test_torchs_checkpoint_functions_change_no_bit(moment: int, options: dict[str, bool]) -> None:
    """They step a fresh optimizer, at rate 0, to allocate its state: that step is none of the run.

    Incident: a schedule kept as one tuple, None before the soft phase, could not be loaded with full_state_dict.
    """

    def model() -> tuple[nn.Module, SoftSignum]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        return net, SoftSignum(net.parameters(), lr=0.1, weight_decay=0.1, **RUN)

    (net, optimizer), (other, loaded) = model(), model()
    train(list(net.parameters()), optimizer, range(moment))
    state = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=StateDictOptions(**options)))
    set_optimizer_state_dict(other, loaded, state, options=StateDictOptions(**options))
    other.load_state_dict(net.state_dict())
    for n, o in ((net, optimizer), (other, loaded)):
        train(list(n.parameters()), o, range(moment, 12))
    alone, plain = model()
    train(list(alone.parameters()), plain, range(12))
    results = [everything(list(n.parameters()), o) for n, o in ((net, optimizer), (other, loaded), (alone, plain))]
    assert results[0] == results[1] == results[2]


def test_loading_again_and_again_leaves_the_param_groups_their_keys() -> None:
    params = parameters()
    optimizer = build(params)
    train(params, optimizer, range(1))
    keys = [list(group) for group in optimizer.state_dict()["param_groups"]]
    for _ in range(3):
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    assert [list(group) for group in optimizer.state_dict()["param_groups"]] == keys


@pytest.mark.parametrize(("saved", "kept"), [(BRAIN, torch.float32), (torch.float32, BRAIN)])
def test_loading_keeps_the_state_dtype_of_the_optimizer(saved: torch.dtype, kept: torch.dtype) -> None:
    params, others = parameters(), parameters()
    source, target = build(params, state_dtype=saved), build(others, state_dtype=kept)
    train(params, source, range(2))
    target.load_state_dict(source.state_dict())
    for x, y in zip(params, others, strict=True):
        assert torch.equal(target.state[y][EXP_AVG], source.state[x][EXP_AVG].to(kept))
        assert target.state[y][EXP_AVG].dtype == kept
    train(others, target, range(2, 4))


def test_bfloat16_states_begin_their_soft_phase_by_their_own_bits() -> None:
    params = parameters()
    optimizer = build(params, state_dtype=BRAIN)
    train(params, optimizer, range(6))
    m = torch.cat([optimizer.state[x][EXP_AVG].flatten() for x in params]).float()
    assert optimizer.schedule[:2] == (m.median().item(), (m - m.median()).abs().median().item())


def test_before_the_soft_phase_a_new_length_counts(caplog: pytest.LogCaptureFixture) -> None:
    """Saved at step 4 of 10; as a run of 20, and of 6, whose soft phase would have begun at step 3: it begins at once,
    and ends where the run does. The new phases were taken without a line."""
    params = parameters()
    optimizer = build(params)
    train(params, optimizer, range(4))
    for total, first, length in ((20, 10, 10), (6, 4, 2)):
        others = parameters()
        loaded = build(others, total_steps=total)
        loaded.load_state_dict(through_a_file(optimizer.state_dict()))
        line, half = caplog.messages[-1], total // 2
        assert "in its hard phase, at step 4, by a run with sign_iters=5, transition_iters=5: " in line
        assert f": sign_iters={half}, transition_iters={half} of this run counts" in line and "\n" not in line
        train(others, loaded, range(4, first))
        assert loaded.param_groups[1]["soft_first"] == -1
        train(others, loaded, range(first, total))
        for group in loaded.param_groups:
            assert (group["soft_first"], group["soft_length"]) == (first, length) and group["steps_taken"] == total
    # So do eps and tmax.
    loaded = build(parameters(), eps=1e-3, tmax=20.0)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert [(group["eps"], group["tmax"]) for group in loaded.param_groups] == [(1e-3, 20.0)] * 2
    # A run of hard steps alone stays hard, and a soft phase may begin behind all that was planned.
    for settings, soft in (({"soft_start": 1.0}, False), ({"total_steps": 3}, True)):
        others = parameters()
        loaded = build(others, **settings)
        loaded.load_state_dict(through_a_file(optimizer.state_dict()))
        train(others, loaded, range(4, 7))
        assert (loaded.schedule is not None) == soft


def test_inside_the_soft_phase_the_schedule_is_kept_and_that_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    params = parameters()
    optimizer = build(params)
    train(params, optimizer, range(7))
    saved = through_a_file(optimizer.state_dict())
    others = parameters()
    loaded = build(others, total_steps=100, tmax=20.0)
    with caplog.at_level(logging.WARNING):
        loaded.load_state_dict(saved)
    assert "goes on as it began, 5 steps from step 5: sign_iters=50, transition_iters=50, tmax=20.0" in caplog.text
    assert "\n" not in caplog.messages[0] and len(caplog.messages) == 1
    assert loaded.tau == optimizer.tau
    caplog.clear()
    # What is saved again is the run that goes on.
    build(parameters()).load_state_dict(loaded.state_dict())
    assert not caplog.text


def test_a_run_that_is_soft_from_its_first_step_keeps_its_schedule(caplog: pytest.LogCaptureFixture) -> None:
    """Its soft phase begins at step 0, which is a number like any other."""
    params = parameters()
    optimizer = build(params, soft_start=0.0)
    train(params, optimizer, range(3))
    loaded = build(parameters(), total_steps=100, soft_start=0.0, tmax=20.0)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert "goes on as it began, 10 steps from step 0: transition_iters=100, tmax=20.0" in caplog.text
    assert loaded.schedule == optimizer.schedule and loaded.param_groups[0]["tmax"] == optimizer.param_groups[0]["tmax"]


@pytest.mark.parametrize("kind", [SoftSignum, SoftMuon])
def test_a_temperature_that_cannot_fall_is_a_warning(kind: type, caplog: pytest.LogCaptureFixture) -> None:
    """Half of the weights never got a gradient, so median and deviation are 0: the soft phase was hard to its end, and
    the one line of it said that it was soft."""
    weights = [nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
    optimizer = kind(weights, lr=0.1, weight_decay=0.1, **RUN)
    with caplog.at_level(logging.WARNING):
        train(weights[:1], optimizer, range(7))
    (line,) = caplog.messages
    assert "keeps its first temperature, 1e+09" in line and "median 0 and the deviation 0" in line and "\n" not in line
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        train(weights, kind(weights, lr=0.1, weight_decay=0.1, **RUN), range(7))
    assert not caplog.messages


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_where_the_soft_phase_begins_is_one_line_at_the_engines_level(
    level: int, caplog: pytest.LogCaptureFixture
) -> None:
    """In Megatron nothing showed that the soft phase had begun, and later a tau that cannot fall was two warnings."""
    weights = [nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
    optimizer = SoftSignum(weights, lr=0.1, weight_decay=0.1, **RUN)
    optimizer.level_of_begin = level
    with caplog.at_level(logging.INFO, logger="s3_megatron.optim"):
        train(weights, optimizer, range(7))
    (record,) = [record for record in caplog.records if "is soft" in record.getMessage()]
    schedule = optimizer.schedule
    assert schedule is not None and record.levelno == level
    assert record.getMessage().startswith(
        f"SoftSignum is soft from step {schedule.first + 1} on, for {schedule.length} steps, down to a tau of "
    )
    assert record.getMessage().endswith(f"the median {schedule.mu:.4g} and the deviation {schedule.sigma:.4g}")


def test_states_of_other_optimizers_are_refused_and_nothing_changes() -> None:
    for kind in (S3, torch.optim.AdamW, torch.optim.SGD):
        params, theirs = parameters(), parameters()
        other = kind([{"params": theirs[:2]}, {"params": theirs[2:]}], lr=0.1, weight_decay=0.1)
        train(theirs, other, range(2))
        optimizer = build(params)
        train(params, optimizer, range(2))
        before = everything(params, optimizer)
        with pytest.raises(S3Error, match="not written by SoftSignum") as caught:
            optimizer.load_state_dict(other.state_dict())
        assert "\n" not in str(caught.value) and everything(params, optimizer) == before
        if kind is S3:
            with pytest.raises(S3Error, match="not written by S3"):
                other.load_state_dict(optimizer.state_dict())


def test_a_state_that_came_past_load_state_dict_is_looked_at() -> None:
    params = parameters()
    optimizer = build(params)
    train(params, optimizer, range(2))
    optimizer.state[params[0]]["exp_avg_sq"] = torch.ones(3, 5)
    with pytest.raises(S3Error, match="has exp_avg, exp_avg_sq: SoftSignum's are exp_avg"):
        optimizer.step()
    del optimizer.state[params[0]]["exp_avg_sq"], optimizer.param_groups[1]["softsignum_state"]
    with pytest.raises(S3Error, match="not written by SoftSignum"):
        optimizer.step()


def test_a_state_that_is_not_finite_cannot_begin_a_soft_phase() -> None:
    params = parameters()
    optimizer = build(params)
    train(params, optimizer, range(5))
    for x in params:
        optimizer.state[x][EXP_AVG].fill_(float("nan"))
    with pytest.raises(S3Error, match="median of the momentum is nan"):
        train(params, optimizer, range(5, 6))


NAN, INF = float("nan"), float("inf")
BAD = [
    *[({"lr": value}, f"lr is {value}: it must be a finite number >= 0") for value in (-1e-9, NAN, INF)],
    ({"lr": torch.tensor([0.1, 0.2])}, "lr is a tensor of 2 elements"),
    *[({"beta": value}, f"beta is {value}: it must lie in [0, 1)") for value in (-0.1, 1.0, NAN)],
    *[({"weight_decay": value}, f"weight_decay is {value}: it must be a finite number") for value in (-1.0, NAN)],
    *[({"eps": value}, f"eps is {value}: it must lie in (0, 1)") for value in (0.0, 1.0, -1.0, NAN)],
    *[({"tmax": value}, f"tmax is {value}: it must be a number >= 1") for value in (-1.0, 0.5, NAN)],
    ({"soft_start": 1.5}, "soft_start is 1.5"),
    ({"total_steps": None}, "the length of the run is not known"),
    ({"state_dtype": torch.float16}, "torch.float32 or torch.bfloat16"),
    ({"rounding_seed": 1}, "rounding_seed is for state_dtype=torch.bfloat16"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_values_are_refused_in_one_line_before_anything_is_built(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(S3Error) as caught:
        SoftSignum(parameters(), **(RUN | settings))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_values_of_a_group_are_checked_and_the_runs_own_are_no_groups() -> None:
    optimizer = build(parameters())
    train([optimizer.param_groups[0]["params"][0]], optimizer, range(6))
    x = nn.Parameter(torch.ones(2))
    for bad, message in (
        ({"beta": 2.0}, "beta is 2.0"),
        ({"soft_start": 0.25}, "a param group has soft_start: that is the whole run's"),
        ({"steps_taken": 3, "tmax": 20.0}, "has steps_taken, tmax"),
    ):
        with pytest.raises(S3Error, match=message):
            optimizer.add_param_group({"params": [x], **bad})
    with pytest.raises(S3Error, match="real floating-point"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 2
    optimizer = copy.deepcopy(optimizer)
    # One that is added late is where the run is.
    optimizer.add_param_group({"params": [x], "lr": 0.2})
    assert optimizer.schedule is not None
    assert [optimizer.param_groups[2][key] for key in KEYS] == [optimizer.param_groups[0][key] for key in KEYS]


@pytest.mark.parametrize("name", ["capturable", "foreach", "betas", "momentum", "dampening", "tau"])
def test_an_argument_that_it_has_not_is_refused_with_those_it_has(name: str) -> None:
    with pytest.raises(
        TypeError, match=f"SoftSignum has no argument '{name}'; it has lr, beta, weight_decay, nesterov"
    ):
        SoftSignum(parameters(), **{name: True})


def test_a_negative_temperature_and_a_sparse_gradient_are_refused() -> None:
    for tau in (-1.0, 0.0, NAN):
        with pytest.raises(S3Error, match=f"tau is {tau}: a temperature must be > 0"):
            SoftRule(lr=0.1, beta=0.9, tau=tau, weight_decay=0.1, nesterov=False).check()
    embedding = nn.Embedding(10, 3, sparse=True)
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(S3Error, match=r"the step takes dense tensors, .* sparse=False"):
        SoftSignum(embedding.parameters(), soft_start=1).step()
    assert torch.equal(embedding.weight, before)


def test_an_infinite_tmax_makes_the_first_soft_step_hard() -> None:
    params = parameters()
    optimizer = build(params, tmax=INF)
    train(params, optimizer, range(5))
    assert optimizer.tau == INF
    train(params, optimizer, range(5, 7))
    assert 1 < optimizer.tau < INF
