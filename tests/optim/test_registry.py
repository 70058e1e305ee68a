"""The Specs: what is made of them agrees with the classes, the documents and itself."""

import argparse
import importlib
import inspect
import pickle
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from s3_megatron.errors import S3Error
from s3_megatron.jobs import compose
from s3_megatron.jobs.job import Job
from s3_megatron.optim import EXP_AVG, EXP_AVG_ROOT, S3, from_adam_state, registry
from s3_megatron.optim.polar import Precision
from s3_megatron.optim.spec import OVERRIDE, Hyperparameter, Range, Spec
from s3_megatron.optim.state import accept, check_convertible, check_entry, written_by
from tests.toy import Toy

DOCS = Path(__file__).parents[2] / "docs"
SPECS = pytest.mark.parametrize("spec", registry.specs(), ids=lambda spec: spec.name)


@SPECS
def test_a_class_has_the_arguments_and_the_state_of_its_spec(spec: Spec) -> None:
    kind = spec.load()
    assert kind.__name__ == spec.title and kind.spec is spec
    arguments = inspect.signature(kind).parameters
    for each in spec.hyperparameters:
        assert arguments[each.name].default == each.default, each.name
        assert each.default is None or each.range is None or each.range.holds(each.default)
    defaults = {each.name: each.default for each in spec.hyperparameters}
    optimizer = kind([torch.nn.Parameter(torch.ones(3, 3))], **spec.chosen(spec.complete(defaults, 50)))
    optimizer.allocate_state()
    (entry,), (group,) = optimizer.state.values(), optimizer.param_groups
    assert tuple(entry) == spec.state_names and {*spec.state_keys} <= group.keys()
    assert written_by(optimizer.param_groups) == spec.name


@SPECS
def test_the_tables_of_the_documents_are_the_specs(spec: Spec) -> None:
    pages = {name: (DOCS / f"{name}.md").read_text() for name in ("megatron", "deepspeed")}
    for each in (*spec.hyperparameters, *spec.engine):
        flag, default, text = spec.flag(each.name), each.shown_default, each.described
        if each.count > 1:
            flag += " BETA1 BETA2"
        param = default
        if each.kind is bool:
            flag, default, text = spec.flag(each.switch), "", f"do not {each.help}" if each.default else each.help
            param = str(each.default).lower()
        rows = {
            "megatron": f"| `{flag}` | {default} | {text} |".replace("|  |", "| |"),
            "deepspeed": f"| `{each.name}` | {param} | {each.described} |",
        }
        if each in spec.engine:  # Megatron's
            del rows["deepspeed"]
        for page, row in rows.items():
            assert row in pages[page].splitlines(), f"docs/{page}.md lacks the line\n{row}"
    for switch in spec.switches:
        assert f"| `{spec.flag(switch)}` |" in pages["megatron"] and f"| `{spec.field(switch)}` |" in pages["deepspeed"]


BAD = [("p", 0.5, ">= 1"), ("beta", 1.0, "[0, 1)"), ("betas", (0.9, -0.1), "[0, 1)"), ("p", float("nan"), ">= 1")]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD)
def test_a_range_is_the_same_everywhere(name: str, value: object, allowed: str) -> None:
    """Three lists of ranges were almost the same."""
    from pydantic import ValidationError

    from s3_megatron.engines.deepspeed.build import make
    from s3_megatron.jobs.recipe import section

    weights, rates = [torch.nn.Parameter(torch.ones(3))], {"lr": 1.0, "weight_decay": 0.1}
    for check in (
        lambda: S3(weights, **{name: value}),
        lambda: make(registry.S3, weights, {name: value}, bf16_states=False),
        lambda: registry.S3.check({name: value}, registry.S3.flag),
    ):
        with pytest.raises(S3Error) as refused:
            check()
        assert name in str(refused.value) and allowed in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(ValidationError):
        section(registry.S3).model_validate({"name": "s3", "lr": 1.0, "adamw": rates, name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nesterov": "false"}, "nesterov is 'false': it must be true or false"),  # any text is true to Python
        ({"p": "3"}, "p is '3': it must be a number"),  # a TypeError of Python's
        ({"betas": 0.9}, "betas is 0.9: it must be a pair"),
        ({"lr": "1e-3"}, "lr is '1e-3': it must be a number"),
        ({"p": [3]}, r"p is \[3\]: it must be a number"),
    ],
)
def test_a_text_where_a_value_belongs_is_one_line(values: dict[str, object], message: str) -> None:
    """A DeepSpeed configuration is JSON, and "false" in quotes turned nesterov on."""
    from s3_megatron.engines.deepspeed.build import make

    with pytest.raises(S3Error, match=message):
        make(registry.S3, [torch.nn.Parameter(torch.ones(3))], values, bf16_states=False)


def test_a_pair_counts_before_its_one_value() -> None:
    values = {"beta": 0.95, "p": 3.0, "betas": None, "nesterov": True}
    assert registry.S3.chosen(values) == {"beta": 0.95, "p": 3.0, "nesterov": True}
    assert registry.S3.chosen({**values, "betas": (0.9, 0.8)}) == {"betas": (0.9, 0.8), "p": 3.0, "nesterov": True}


def test_what_softmuon_takes_is_what_its_library_has() -> None:
    """The Spec lists names, for flags are refused before anything is imported."""
    from emerging_optimizers.orthogonalized_optimizers import muon, muon_utils

    known = {each.name: each.choices for each in registry.SOFTMUON.hyperparameters}
    assert {*known["scale_mode"]} == {*get_args(muon.MuonScaleT)}
    assert {*known["coefficient_type"]} == {*get_args(muon_utils.NSCoeffT)} - {"custom"}
    assert known["fp32_matmul_prec"] == get_args(Precision)
    (rest,) = [each.choices for each in registry.SOFTMUON.engine if each.name == "scalar_optimizer"]
    assert {*rest} == {"adam", *(spec.name for spec in registry.SOFTMUON.beside)}


def test_a_name_in_use_is_refused() -> None:
    registry.add(registry.S3)  # the same again does nothing
    other = Spec("s3", "tests.toy:Toy", "", {EXP_AVG: "m"}, ())
    with pytest.raises(S3Error, match="there is an optimizer s3 already"):
        registry.add(other)
    assert registry.find("S3") is registry.find("s3") is registry.S3 and registry.find(None) is None


@pytest.mark.parametrize(
    ("name", "state", "message"),
    [
        ("adam", {EXP_AVG: "m"}, "none of the hosts' own"),  # it would have replaced every user's Adam
        ("Soft-Sign", {EXP_AVG: "m"}, "small letters and digits"),
        ("other", {"momentum": "m"}, "has the state momentum: it must be exp_avg"),  # no checkpoint would have had it
        ("other", {EXP_AVG_ROOT: "r"}, "has the state exp_avg_sq"),
        ("other", {}, "the state .none."),
    ],
)
def test_a_spec_that_the_hosts_would_miss_is_refused(name: str, state: dict[str, str], message: str) -> None:
    with pytest.raises(S3Error, match=message):
        Spec(name, "tests.toy:Toy", "", state, ())


def test_a_switch_of_a_configuration_is_true_or_false() -> None:
    """The text "false" turned the conversion from Adam on."""
    from s3_megatron.engines.deepspeed.build import _is_on

    assert [_is_on({"s3_from_adam": value}, "s3_from_adam") for value in (True, False, "auto", None)] == [
        *(True, False, False, False)
    ]
    with pytest.raises(S3Error, match="s3_from_adam is 'false': it must be true or false"):
        _is_on({"s3_from_adam": "false"}, "s3_from_adam")


def test_a_switch_that_is_off_by_default_and_a_count_get_flags_of_their_own() -> None:
    config = importlib.import_module("s3_megatron.engines.megatron.config")
    spec = Spec(
        *("other", "tests.toy:Toy", "nowhere", {EXP_AVG: "m"}),
        (
            Hyperparameter("steps", 10, "how many steps", kind=int, range=Range(1)),
            Hyperparameter("hard", False, "take the sign", kind=bool, defines_state=True),
        ),
    )
    parser = argparse.ArgumentParser()
    config._add_own(parser, spec)
    assert parser.parse_args(["--other-steps", "7", "--other-hard"]) == argparse.Namespace(
        other_steps=7, other_hard=True, other_override_hyperparameters=False
    )
    assert spec.switches == (OVERRIDE,), "without a conversion there is no flag for it"
    assert config.config_class(spec)().other_steps == 10


def test_a_configuration_is_pickled_and_compared() -> None:
    engine = importlib.import_module("s3_megatron.engines.megatron")
    first = {"s3": ("s3_p", 2.0), "softsignum": ("softsignum_total_steps", 9), "softmuon": ("softmuon_num_ns_steps", 6)}
    unset = {"s3": "s3_betas", "softsignum": "softsignum_sign_iters", "softmuon": "softmuon_sign_iters"}
    for spec in registry.OWN:
        name, value = first[spec.name]
        for kind in (getattr(engine, f"{spec.title}OptimizerConfig"), getattr(engine.config, f"{spec.title}Config")):
            made = kind(lr=1.0, **{name: value})
            assert pickle.loads(pickle.dumps(made)) == made and kind.__name__ in dir(sys.modules[kind.__module__])
            assert (made.optimizer, getattr(made, name), getattr(made, unset[spec.name])) == (spec.name, value, None)
    # What moves the rest is configured with it.
    assert (made.s3_p, made.softsignum_beta, made.softmuon_tp_mode) == (3.0, 0.9, "duplicated")


def test_what_differs_of_the_state_is_refused_overridden_or_left() -> None:
    ours = [{"betas": (0.95, 0.95), "p": 3.0, "nesterov": True}] * 2
    saved = [{"betas": [0.9, 0.9], "p": 3.0}, {"betas": [0.95, 0.95], "p": 2.0, "nesterov": True}]
    refusals: list[str] = []
    accept(saved, ours, registry.S3, lambda what: bool(refusals.append(what)))
    assert refusals == [
        "the state was made by S3 with betas=(0.9, 0.9), p=2.0 and this run asks for betas=(0.95, 0.95), p=3.0"
    ]
    assert saved[0]["betas"] == [0.9, 0.9]
    accept(saved, ours, registry.S3, lambda what: True)
    assert [(group["betas"], group["p"]) for group in saved] == [((0.95, 0.95), 3.0)] * 2
    accept(saved, ours, registry.S3, lambda what: pytest.fail("nothing differs any more"))


def test_a_state_of_ours_is_no_adams() -> None:
    """The marks alone distinguished S3's state from Adam's: the conversion's flag would have rooted r once more."""
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    s3, toy = S3([param], weight_decay=0.1), Toy([param], weight_decay=0.1)
    s3.step()
    toy.step()
    for wrong, into in ((s3, s3), (toy, s3)):
        with pytest.raises(S3Error, match=f"was written by {wrong.spec.name} and not by Adam"):
            from_adam_state(wrong.state_dict(), into)
        with pytest.raises(S3Error, match=r"another form|written by optimizer toy"):
            check_convertible(
                [{wrong.spec.mark: "a later version's"}], registry.S3, asked=True, ask="", fresh="start afresh"
            )
    for source, target in ((s3, toy), (toy, s3)):
        with pytest.raises(S3Error, match=f"was not written by {target.spec.title}"):
            target.load_state_dict(source.state_dict())
    with pytest.raises(S3Error, match="Toy cannot go on from Adam's state"):
        from_adam_state(torch.optim.AdamW([param]).state_dict(), toy)
    both = {EXP_AVG: param, EXP_AVG_ROOT: param}
    with pytest.raises(S3Error, match=r"has exp_avg, exp_avg_sq: Toy's are exp_avg;"):
        check_entry(both, param.shape, Toy.spec)


def test_a_range_may_leave_out_where_it_begins() -> None:
    """eps of 0 would be a tanh that reaches 1: a temperature of infinity in every soft step."""
    open_below = Range(0, 1, includes_low=False)
    assert [open_below.holds(x) for x in (0.0, 1e-300, 0.5, 1.0, float("nan"))] == [False, True, True, False, False]
    assert (f"{open_below}", f"{Range(0, 1)}", f"{Range(2, includes_low=False)}") == ("in (0, 1)", "in [0, 1)", "> 2")
    closed = Range(1, includes_high=True)  # a tmax of infinity: the first soft step is a hard one
    assert [closed.holds(x) for x in (0.5, 1.0, 1e300, float("inf"), float("nan"))] == [False, True, True, True, False]
    assert (f"{closed}", f"{Range(0, 1, includes_high=True)}") == (">= 1", "in [0, 1]")


def test_the_length_of_the_hosts_run_counts_where_nothing_else_gives_it() -> None:
    def total(steps: int | None, **given: object) -> object:
        values = {each.name: each.default for each in registry.SOFTSIGNUM.hyperparameters}
        return registry.SOFTSIGNUM.complete({**values, **given}, steps)["total_steps"]

    assert (total(50), total(50, total_steps=20), total(50, sign_iters=2, transition_iters=3)) == (50, 20, None)
    assert total(None, soft_start=1.0) is None
    with pytest.raises(S3Error, match="the length of the run is not known"):
        total(None)
    with pytest.raises(S3Error, match="sign_iters is 60 and total_steps 50: no soft step is left"):
        total(50, sign_iters=60)
    assert registry.S3.complete({"p": 2.0}, 50) == {"p": 2.0}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"soft_start": 1.5}, "optimizer.soft_start = 1.5: Input should be less than or equal to 1"),
        ({"total_steps": 1.5}, "optimizer.total_steps = 1.5: Input should be a valid integer"),
        ({"sign_iters": 10, "transition_iters": 0}, ": optimizer: transition_iters is 0: it must be a whole"),
        ({"sign_iters": 200}, ": optimizer: sign_iters is 200 and total_steps 128: no soft step is left"),
        ({"transition_iters": 20}, ": optimizer: transition_iters is 20 without sign_iters"),
        ({"soft_start": 0.999}, ": optimizer: soft_start=0.999 leaves no soft step of total_steps=128"),
        ({"tmax": ".nan"}, "optimizer.tmax = NaN"),
    ],
)
def test_a_recipe_that_cannot_be_relaxed_is_refused_before_anything_is_built(
    settings: dict[str, object], said: str
) -> None:
    """A recipe's schedule has the length; a refusal of the whole file began with an empty key."""
    with pytest.raises(S3Error) as refused:
        softsignum(settings)
    assert said in str(refused.value) and "\n" not in str(refused.value) and ": :" not in str(refused.value)


def test_a_recipe_of_softsignum_becomes_flags() -> None:
    """What is left out is left out: the length is Megatron's --train-iters. An infinite tmax was refused."""
    from s3_megatron.jobs.catalog import as_yaml
    from s3_megatron.jobs.flags import optimizer
    from s3_megatron.jobs.memory import estimate

    job = softsignum({"tmax": ".inf"})
    assert optimizer(job.recipe.optimizer, 0.1) == {
        "optimizer": "softsignum",
        "lr": 1e-4,
        "min_lr": 1e-5,
        "weight_decay": 0.3,
        "softsignum_beta": 0.9,
        "softsignum_nesterov": False,
        "softsignum_soft_start": 0.9,
        "softsignum_eps": 1e-4,
        "softsignum_tmax": float("inf"),
    }
    assert "tmax: .inf" in as_yaml(job.recipe)
    given = optimizer(softsignum({"sign_iters": 0, "transition_iters": 100, "nesterov": True}).recipe.optimizer, 0)
    assert (given["softsignum_sign_iters"], given["softsignum_nesterov"]) == (0, True)
    for engine in ("megatron", "deepspeed"):
        memory = estimate(softsignum({}, f"engine={engine}"))
        assert memory.exp_avg > 0 and memory.exp_avg_root == 0


def test_a_recipe_of_softmuon_becomes_flags() -> None:
    """What moves the rest is in the recipe, and its state in the estimate: a matrix has none but m."""
    from s3_megatron.jobs.flags import optimizer
    from s3_megatron.jobs.memory import estimate, parameters

    def job(*settings: str) -> Job:
        return compose.load("gpt2_tiny", "local", ["optimizer=softmuon", *settings])

    whole = job("optimizer.split_qkv=false", "optimizer.tp_mode=blockwise", "optimizer.nesterov=false")
    given = optimizer(whole.recipe.optimizer, 0.1)
    assert (given["optimizer"], given["lr"], given["weight_decay"]) == ("softmuon", 3e-4, 0.1)
    named = ("no_nesterov", "no_split_qkv", "scalar_optimizer", "tp_mode", "scale_mode", "num_ns_steps")
    assert [given[f"softmuon_{name}"] for name in named] == [True, True, "s3", "blockwise", "spectral", 5]
    assert "softmuon_total_steps" not in given, "that is Megatron's --train-iters"
    with pytest.raises(S3Error, match=r"optimizer\.scalar_optimizer = \"lion\": Input should be 's3', 'adam' or"):
        job("optimizer.scalar_optimizer=lion")
    for engine in ("megatron", "deepspeed"):
        memory = estimate(job(f"engine={engine}"))
        # 4 layers of width 192, all on each of 2 ranks; the rest are the embedding and what has one dimension.
        matrices = 4 * 12 * 192**2 + 128 * 192
        assert memory.exp_avg == 4 * parameters(whole) // 2
        assert memory.exp_avg_root == 4 * (parameters(whole) - matrices) // 2
    assert estimate(job("optimizer.scalar_optimizer=softsignum")).exp_avg_root == 0


def softsignum(settings: dict[str, object], *more: str) -> Job:
    given = [f"optimizer.{name}={value}" for name, value in settings.items()]
    return compose.load("gpt2_tiny", "local", ["optimizer=softsignum", *given, *more])


def test_the_iterations_of_a_run_in_samples() -> None:
    config = importlib.import_module("s3_megatron.engines.megatron.config")
    known = {"train_iters": None, "train_samples": 103, "global_batch_size": 10, "rampup_batch_size": None}
    assert config._iterations(argparse.Namespace(**known)) == 10
    assert config._iterations(argparse.Namespace(**{**known, "train_iters": 7, "train_samples": None})) == 7
    for other in (
        {"rampup_batch_size": ["2", "2", "10"]},
        {"step_batch_size_schedule": "0:2 50:10"},
        {"train_samples": None},
    ):
        assert config._iterations(argparse.Namespace(**{**known, **other})) is None
