"""install(): what it replaces, and what it refuses, in one process."""

import argparse
import builtins
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from s3_megatron.engines.versions import MEGATRON
from s3_megatron.errors import S3Error

REPLACED = [
    "megatron.training.arguments._add_training_args",
    "megatron.training.arguments.validate_args",
    "megatron.training.training.get_megatron_optimizer_config",
    "megatron.training.training.get_megatron_optimizer",
    "megatron.training.training.training_log",
    "megatron.training.training.evaluate",
    "megatron.training.training.evaluate_and_print_results",
    "megatron.core.optimizer.get_megatron_optimizer",
    "megatron.core.optimizer.optimizer.clip_grad_by_total_norm_fp32",
    "megatron.core.optimizer.optimizer.get_grad_norm_fp32",
]
SOFTSIGNUM = ("--optimizer", "softsignum")


def host(module: str) -> Any:
    """A module of Megatron, or the engine, imported when a test runs: whoever only collects this file is spared it."""
    return importlib.import_module(module)


def install() -> None:
    host("s3_megatron.engines.megatron").install()


def uninstall() -> None:
    host("s3_megatron.engines.megatron").uninstall()


def symbols() -> list[Any]:
    return [getattr(host(module), name) for module, _, name in (symbol.rpartition(".") for symbol in REPLACED)]


def test_install_is_idempotent_and_undone_to_the_original() -> None:
    before = symbols()
    install()
    once = symbols()
    install()
    assert symbols() == once
    assert all(a is not b for a, b in zip(before, once, strict=True))
    uninstall()
    assert symbols() == before
    uninstall()  # a second time does nothing
    assert symbols() == before


def test_a_megatron_known_not_to_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = symbols()
    monkeypatch.setattr("megatron.core.package_info.__version__", "0.3.1")
    monkeypatch.setattr(
        host("s3_megatron.engines.megatron.install"),
        "MEGATRON",
        replace(MEGATRON, broken={"0.3": "it has no fourth dimension"}),
    )
    with pytest.raises(S3Error, match=r"megatron-core 0\.3\.1 does not work with S3: it has no fourth dimension; "):
        install()
    assert symbols() == before


def test_a_megatron_never_run_is_warned_about_and_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("megatron.core.package_info.__version__", "0.99.0")
    install()
    uninstall()
    install()
    (warning,) = caplog.messages
    assert "megatron-core 0.99.0 was never run with S3" in warning and ", ".join(MEGATRON.tested) in warning
    uninstall()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("megatron/no_core.py", r"is not installed: pip install"),
        ("megatron/core/__init__.py", r"cannot be imported \(No module named 'no_such_module'\): pip install"),
    ],
)
def test_a_megatron_that_cannot_be_imported_is_one_line_with_the_reason(
    file: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails at its import was called not installed, as DeepSpeed was without setuptools."""
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / "megatron/__init__.py").touch()  # without it, both would be one namespace
    (tmp_path / file).write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("megatron", "megatron.core", "megatron.core.package_info"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(S3Error, match=f"megatron-core {message}"):
        install()


def test_a_wheel_without_megatron_training_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those before 0.17 are."""
    before = symbols()
    monkeypatch.setitem(sys.modules, "megatron.training", None)
    with pytest.raises(
        S3Error, match=r"without megatron\.training.*install one of .*or run from a Megatron-LM checkout"
    ):
        install()
    assert symbols() == before


def test_the_gpt_entry_refuses_a_megatron_without_its_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.17 and 0.18 lack more; whatever else the entry imports, they have."""
    monkeypatch.delattr("megatron.training.argument_utils.gpt_config_from_args", raising=False)
    monkeypatch.delitem(sys.modules, "s3_megatron.train.gpt", raising=False)
    with pytest.raises(S3Error, match=r"needs megatron-core 0\.19: .*-m s3_megatron\.train\.run SCRIPT") as refused:
        importlib.import_module("s3_megatron.train.gpt")
    assert "\n" not in str(refused.value)


def test_a_patched_megatron_may_install_while_install_imports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patched megatron/training/__init__.py ends with install(), so install()'s own import of it calls install()
    again; the outer call then wrapped every wrapper once more, and one uninstall() left the first ones in place."""
    before = symbols()
    find = builtins.__import__

    def patched(name: str, *args: Any, **kwargs: Any) -> Any:
        module = find(name, *args, **kwargs)
        if name == "megatron.training":
            monkeypatch.undo()
            install()
        return module

    monkeypatch.setattr(builtins, "__import__", patched)
    install()
    assert builtins.__import__ is find, "install() imports what is patched"
    assert [symbol.__wrapped__ for symbol in symbols()] == before, "wrapped once"
    uninstall()
    assert symbols() == before


def test_a_moved_symbol_is_loud_and_nothing_stays_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    before = symbols()
    monkeypatch.delattr("megatron.training.training.training_log")
    with pytest.raises(S3Error, match=r"has no megatron\.training\.training\.training_log"):
        install()
    monkeypatch.undo()
    assert symbols() == before


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch):
    """Megatron's own parser and validation over a minimal command line, with S3 installed."""
    install()
    # One CPU process has no CUDA device to ask; validation only wants its generation.
    arguments = host("megatron.training.arguments")
    monkeypatch.setattr(arguments, "get_device_arch_version", lambda: 10)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    def run(*extra: str) -> argparse.Namespace:
        command = (
            "prog --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
            "--max-position-embeddings 32 --train-iters 2 --lr 1e-3 --tokenizer-type NullTokenizer --vocab-size 9 "
            "--transformer-impl local --optimizer s3"
        )
        monkeypatch.setattr("sys.argv", [*command.split(), *extra])
        args = arguments.parse_args()
        arguments.validate_args(args)
        return args

    yield run
    uninstall()


def test_flags_reach_the_config(parse) -> None:
    args = parse("--s3-beta", "0.9", "--s3-p", "2", "--s3-no-nesterov", "--use-distributed-optimizer")
    assert args.optimizer == "s3" and args.use_distributed_optimizer
    assert not getattr(args, "use_layer_wise_distributed_optimizer", False), "0.17 has none"
    config, _ = host("megatron.training.training").get_megatron_optimizer_config(args)
    assert isinstance(config, host("s3_megatron.engines.megatron.config").S3Config) and config.optimizer == "s3"
    assert (config.s3_beta, config.s3_p, config.s3_nesterov, config.s3_betas) == (0.9, 2.0, False, None)
    assert config.lr == 1e-3 and config.use_distributed_optimizer


def test_defaults_are_the_papers(parse) -> None:
    config, _ = host("megatron.training.training").get_megatron_optimizer_config(parse())
    assert (config.s3_beta, config.s3_p, config.s3_nesterov) == (0.95, 3.0, True)


def test_the_runs_length_is_softsignums(parse) -> None:
    """Validation completed the arguments and threw that away: DeepSpeed's entry, which asks them, knew no length."""
    args = parse(*SOFTSIGNUM, "--softsignum-soft-start", "0.5")
    assert args.softsignum_total_steps == 2
    config, _ = host("megatron.training.training").get_megatron_optimizer_config(args)
    assert isinstance(config, host("s3_megatron.engines.megatron.config").SoftSignumConfig)
    assert (config.softsignum_total_steps, config.softsignum_soft_start, config.softsignum_sign_iters) == (2, 0.5, None)


def test_adam_gets_megatrons_own_config(parse) -> None:
    config, _ = host("megatron.training.training").get_megatron_optimizer_config(parse("--optimizer", "adam"))
    assert type(config).__module__ == "megatron.core.optimizer.optimizer_config"  # 0.17 has one for Adam


def test_from_adam_takes_the_new_rates(parse) -> None:
    assert parse("--s3-from-adam").override_opt_param_scheduler


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--s3-p", "0.5"), r"--s3-p is 0\.5: .*>= 1"),
        (("--s3-p", "nan"), r"--s3-p is nan: .*>= 1"),
        (("--s3-beta", "1"), r"--s3-beta is 1\.0: .*\[0, 1\)"),
        (("--s3-betas", "0.9", "-0.1"), r"--s3-betas is \[0\.9, -0\.1\]: .*\[0, 1\)"),
        (("--optimizer-cpu-offload",), r"--optimizer-cpu-offload does not work with --optimizer s3: "),
        (("--use-megatron-fsdp",), r"--use-megatron-fsdp does not work .* --use-distributed-optimizer"),
        ((*SOFTSIGNUM, "--softsignum-soft-start", "1.5"), r"--softsignum-soft-start is 1\.5: it must lie in \[0, 1\]"),
        ((*SOFTSIGNUM, "--softsignum-sign-iters", "-1"), r"--softsignum-sign-iters is -1: .* whole number >= 0"),
        (
            (*SOFTSIGNUM, "--softsignum-sign-iters", "1", "--softsignum-transition-iters", "0"),
            "transition_iters is 0: ",
        ),
        (SOFTSIGNUM, r"soft_start=0\.9 leaves no soft step of total_steps=2: lower it"),
    ],
)
def test_bad_values_name_the_value_the_range_and_the_fix(parse, extra: tuple[str, ...], message: str) -> None:
    with pytest.raises(S3Error, match=message) as caught:
        parse(*extra)
    assert "\n" not in str(caught.value)


def test_an_unknown_optimizer_is_refused_with_the_choices(parse, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--optimizer", "s4")
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "invalid choice: 's4'" in error and "s3" in error and len(error.splitlines()) <= 2


def test_one_wrapper_serves_both_names() -> None:
    install()
    try:
        one, other = (host(f"megatron.{module}") for module in ("core.optimizer", "training.training"))
        assert one.get_megatron_optimizer is other.get_megatron_optimizer
    finally:
        uninstall()
