"""What S3 ignores in a param group is logged once; what others keep there for themselves is not."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from torch.optim import swa_utils

from s3_megatron.optim import S3, registry, settings


@pytest.fixture(autouse=True)
def first_in_the_process() -> Iterator[None]:
    settings._warn_of_ignored.cache_clear()
    yield
    settings._warn_of_ignored.cache_clear()


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    "group",
    [
        {"foreach": True},
        {"fused": True},
        {"amsgrad": True},
        {"eps": 1e-8},
        {"momentum": 0.9},
        {"weight_deacy": 0.1},  # mistyped: the group decayed by the default, AdamW's too
        {"state_dtype": torch.bfloat16},
        {"implementation": "foreach", "capturable": True},
    ],
    ids=lambda group: ",".join(group),
)
def test_what_is_ignored_is_named_once(group: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """They were silently accepted, where the same names are a TypeError as arguments."""
    optimizer = S3([{"params": [weight()], **group}, {"params": [weight()], **group}], weight_decay=0.1)
    optimizer.add_param_group({"params": [weight()], **group})
    S3([{"params": [weight()], **group}])
    (line,) = caplog.messages
    assert "\n" not in line and "a group of S3's has lr, beta, betas, p, weight_decay, nesterov" in line
    assert line.startswith(f"S3 ignores {', '.join(map(repr, group))} in a param group")


@pytest.mark.parametrize("way", ["loaded", "pickle", "deepcopy"])
def test_it_is_named_when_it_comes_with_a_checkpoint_or_a_copy(way: str, caplog: pytest.LogCaptureFixture) -> None:
    optimizer = S3([weight()])
    if way == "loaded":
        state = optimizer.state_dict()
        state["param_groups"][0]["eps"] = 1e-8
        optimizer.load_state_dict(state)
    else:
        optimizer.param_groups[0]["eps"] = 1e-8
        copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert [line.partition(" in ")[0] for line in caplog.messages] == ["S3 ignores 'eps'"]


def test_one_rank_names_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("RANK", "1")
    S3([{"params": [weight()], "eps": 1e-8}])
    assert caplog.messages == []


def test_the_groups_of_another_optimizer_are_taken_but_for_what_they_ask(caplog: pytest.LogCaptureFixture) -> None:
    """AdamW's groups have nine keys that S3's do not, and all but eps have no effect unless they were set."""
    S3(torch.optim.AdamW([weight()], weight_decay=0.1).param_groups)
    S3(torch.optim.AdamW([weight()], weight_decay=0.1, amsgrad=True).param_groups)
    assert [line.partition(" in ")[0] for line in caplog.messages] == [
        "S3 ignores 'eps'",
        "S3 ignores 'eps', 'amsgrad'",
    ]


def test_torchs_own_notes_pass(caplog: pytest.LogCaptureFixture) -> None:
    """Every scheduler of torch, named parameters, and a state that was saved and loaded after them."""
    named = S3([("weight", weight())], lr=0.1, weight_decay=0.1)
    for make in (
        lambda opt: schedulers.OneCycleLR(opt, 0.1, total_steps=5, cycle_momentum=False),
        lambda opt: schedulers.OneCycleLR(opt, 0.1, total_steps=5),
        lambda opt: schedulers.CyclicLR(opt, 0.01, 0.1),
        lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, 3),
        lambda opt: schedulers.ReduceLROnPlateau(opt, min_lr=0.01),
        lambda opt: swa_utils.SWALR(opt, swa_lr=0.05),
    ):
        make(named)
    other = S3([("weight", weight())])
    other.load_state_dict(copy.deepcopy(named.state_dict()))
    copy.deepcopy(other)
    assert {"param_names", "initial_lr", "swa_lr", "max_momentum"} <= other.param_groups[0].keys()
    assert [line for line in caplog.messages if "ignores" in line] == []


def test_what_a_group_may_have_is_what_s3_reads() -> None:
    group = S3([weight()]).param_groups[0]
    assert {*settings._OF_GROUPS, registry.S3.mark, "params"} == {*group, "beta"}
