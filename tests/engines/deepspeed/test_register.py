"""register() and unregister(), in this process, without ranks."""

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from s3_megatron.engines import versions
from s3_megatron.engines.deepspeed import register, unregister
from s3_megatron.engines.versions import DEEPSPEED
from s3_megatron.errors import S3Error
from s3_megatron.optim import S3, registry

Touched = list[tuple[Any, str]]


@pytest.fixture
def touched() -> Touched:
    """What register() replaces; imported when a test runs, so that whoever only collects this file is spared it."""
    import deepspeed.runtime.engine as host
    from accelerate import accelerator
    from deepspeed.ops.op_builder.builder import OpBuilder
    from transformers.integrations import deepspeed as hugging_face

    return [
        (host.DeepSpeedEngine, "_is_supported_optimizer"),
        (host.DeepSpeedEngine, "_configure_basic_optimizer"),
        (host.DeepSpeedEngine, "_configure_optimizer"),
        (host.DeepSpeedEngine, "_configure_lr_scheduler"),
        (host.DeepSpeedEngine, "_take_model_step"),
        (host.DeepSpeedEngine, "load_checkpoint"),
        (OpBuilder, "jit_load"),
        (host, "is_zero_supported_optimizer"),
        (accelerator, "map_pytorch_optim_to_deepspeed"),
        (hugging_face.HfTrainerDeepSpeedConfig, "fill_match"),
    ]


@pytest.fixture(autouse=True)
def unregistered() -> Any:
    unregister()
    yield
    unregister()


def test_twice_is_once_and_unregister_leaves_nothing(touched: Touched) -> None:
    before = [getattr(owner, name) for owner, name in touched]
    register()
    once = [getattr(owner, name) for owner, name in touched]
    assert all(now is not original for now, original in zip(once, before, strict=True))
    register()
    assert [getattr(owner, name) for owner, name in touched] == once
    unregister()
    assert [getattr(owner, name) for owner, name in touched] == before


@pytest.mark.parametrize("moved", range(7))
def test_a_moved_symbol_is_named_and_nothing_stays_replaced(
    touched: Touched, moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [getattr(owner, name, None) for owner, name in touched]
    owner, name = touched[moved]
    monkeypatch.delattr(owner, name)
    with pytest.raises(S3Error, match=f"this DeepSpeed has no .*{name}"):
        register()
    monkeypatch.undo()
    assert [getattr(owner, name) for owner, name in touched] == before


@pytest.mark.parametrize("kind", ["SoftSignum", "SoftMuon"])
def test_the_trainers_eps_of_adam_is_none_of_a_temperatures(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """The setting "auto" became 1e-8, and every other value was a mismatch that ended the run."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    register()
    for params, left, wrong in (
        ({"eps": "auto"}, {}, 0),
        ({"eps": 1e-3}, {"eps": 1e-3}, 0),
        ({"lr": 1.0}, {"lr": 1.0}, 1),
    ):
        config = HfTrainerDeepSpeedConfig({"optimizer": {"type": kind, "params": params}})
        config.fill_match("optimizer.params.eps", 1e-8, "adam_epsilon")
        config.fill_match("optimizer.params.lr", 0.5, "learning_rate")
        assert (config.config["optimizer"]["params"], len(config.mismatches)) == (left, wrong)
    assert caplog.messages == [f'"auto" for the eps of {kind} is its own default: the Trainer has that of Adam']
    adam = HfTrainerDeepSpeedConfig({"optimizer": {"type": "AdamW", "params": {"eps": "auto"}}})
    adam.fill_match("optimizer.params.eps", 1e-8, "adam_epsilon")
    assert adam.config["optimizer"]["params"] == {"eps": 1e-8}


def test_an_unlisted_version_warns_and_names_the_window(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    register()
    assert not caplog.records
    unregister()
    monkeypatch.setattr("deepspeed.__version__", "0.20.1")
    register()
    (record,) = caplog.records
    assert "deepspeed 0.20.1" in record.getMessage() and ", ".join(DEEPSPEED.tested) in record.getMessage()
    register()
    assert len(caplog.records) == 1


def test_a_version_known_not_to_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "DEEPSPEED", replace(DEEPSPEED, broken={"0.20": "it moves nothing"}))
    monkeypatch.setattr("deepspeed.__version__", "0.20.1")
    with pytest.raises(S3Error, match=r"deepspeed 0\.20\.1 does not work with S3: it moves nothing; .*install one"):
        register()


_REGISTERS_AT_ITS_IMPORT = """
import sys
from s3_megatron.train.entry import RegisterWithDeepSpeed
sys.meta_path.insert(0, RegisterWithDeepSpeed())
from s3_megatron.engines.deepspeed import register, unregister
register()  # imports DeepSpeed, at whose end register() is called
from deepspeed.runtime.engine import DeepSpeedEngine
assert hasattr(DeepSpeedEngine._take_model_step, "__wrapped__"), "not registered"
assert not hasattr(DeepSpeedEngine._take_model_step.__wrapped__, "__wrapped__"), "registered twice"
unregister()
assert not hasattr(DeepSpeedEngine._take_model_step, "__wrapped__"), "unregister() left something"
"""


@pytest.mark.slow
def test_a_deepspeed_that_registers_s3_at_its_own_import_is_registered_once() -> None:
    """As a patched one does: S3's half-imported modules failed there, and later every wrapper was there twice."""
    run = subprocess.run([sys.executable, "-c", _REGISTERS_AT_ITS_IMPORT], capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr


def test_no_deepspeed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(S3Error, match="DeepSpeed is not installed: pip install"):
        register()


def test_a_deepspeed_that_fails_at_its_import_is_one_line_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.17.6 imports distutils, which a Python 3.12 without setuptools lacks: it was called not installed."""
    (tmp_path / "deepspeed.py").write_text("import no_such_distutils\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    with pytest.raises(S3Error, match=r"DeepSpeed cannot be imported \(No module named 'no_such_distutils'\): pip"):
        register()


def test_params_of_the_configuration_are_s3s_arguments() -> None:
    from s3_megatron.engines.deepspeed.build import make

    settings = {"lr": 3e-3, "beta": 0.9, "p": 2, "weight_decay": 0.01, "nesterov": False, "state_dtype": "bfloat16"}
    optimizer = make(registry.S3, [torch.ones(3)], settings, bf16_states=False)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["p"], group["nesterov"]) == (3e-3, (0.9, 0.9), 2, False)
    assert group["weight_decay"] == 0.01 and optimizer.state_dtype == torch.bfloat16
    (group,) = make(registry.S3, [torch.ones(3)], {"betas": [0.9, 0.95]}, bf16_states=False).param_groups
    assert group["betas"] == (0.9, 0.95)


def test_accelerate_leaves_an_s3_object_alone_under_offload() -> None:
    """It makes a DeepSpeedCPUAdam of every optimizer that it does not recognize (accelerate 1.15)."""
    from accelerate import accelerator

    register()
    optimizer = S3([torch.ones(3)])
    assert accelerator.map_pytorch_optim_to_deepspeed(optimizer) is optimizer


def test_s3_that_arrives_as_another_optimizer_stops_the_run() -> None:
    """As accelerate does, where it was imported after register(): Adam over S3's param groups."""
    from s3_megatron.engines.deepspeed.build import configure_optimizer

    swapped = torch.optim.AdamW(S3([torch.ones(3)]).param_groups)
    engine = SimpleNamespace(basic_optimizer=swapped, optimizer=swapped)  # all of an engine that is looked at there
    with pytest.raises(S3Error, match=r"was S3 and arrived in DeepSpeed as AdamW .*import accelerate before"):
        configure_optimizer(lambda *_: None)(engine, swapped, None)


def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that DeepSpeed's logger gets from here on."""
    from deepspeed.utils import logger

    lines: list[str] = []
    monkeypatch.setattr(logger, "log", lambda level, line: lines.append(line))
    return lines


def test_auto_for_what_s3_has_is_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reached S3 as four letters, and was refused as a pair of the wrong length."""
    from s3_megatron.engines.deepspeed.build import make

    lines = logged(monkeypatch)
    names = ("beta", "betas", "p", "nesterov", "maximize", "rounding_seed", "state_dtype", "implementation")
    names += ("s3_from_adam", "s3_override_hyperparameters")
    for name in names:
        optimizer = make(registry.S3, [torch.ones(3)], {"lr": 3e-3, name: "auto"}, bf16_states=name == "state_dtype")
        assert {**optimizer.param_groups[0], "params": []} == {
            **S3([torch.ones(3)], lr=3e-3).param_groups[0],
            "params": [],
        }
        assert optimizer.state_dtype == (torch.bfloat16 if name == "state_dtype" else torch.float32)
    assert len(lines) == len(names) - 1 and all("auto" in line and "own default" in line for line in lines)
    assert not any("implementation" in line for line in lines)  # its "auto" is S3's


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_auto_that_only_a_trainer_knows_is_refused(name: str) -> None:
    from s3_megatron.engines.deepspeed.build import make

    with pytest.raises(S3Error, match=f'"auto" for {name} .*write a number'):
        make(registry.S3, [torch.ones(3)], {"lr": 3e-3, name: "auto"}, bf16_states=False)


@pytest.mark.parametrize("name", ["eps", "torch_adam", "adam_w_mode", "bias_correction"])
def test_a_param_of_adam_is_refused_and_the_list_does_not_lead_to_betas(name: str) -> None:
    """Who took out eps and kept "betas": "auto" trained with Adam's, and weights moved by three rates."""
    from s3_megatron.engines.deepspeed.build import make

    for value in ("auto", 1e-8):
        with pytest.raises(
            S3Error, match=f"'{name}', which it does not have: take them out; it has beta, impl"
        ) as found:
            make(registry.S3, [torch.ones(3)], {"lr": 3e-3, name: value}, bf16_states=False)
        assert "betas" not in str(found.value)


def filled(betas: Any, trainer: list[float], kind: str = "S3") -> tuple[Any, list[str]]:
    """What transformers makes of the "betas" of a file, where its Trainer has ``trainer``; and what it complains of."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    config = HfTrainerDeepSpeedConfig({"optimizer": {"type": kind, "params": {"lr": 1e-3, "betas": betas}}})
    config.fill_match("optimizer.params.betas", trainer, "adam_beta1+adam_beta2")
    config.fill_match("optimizer.params.lr", 1e-3, "learning_rate")
    return config.get_value("optimizer.params.betas"), config.mismatches


def test_the_trainers_betas_of_adam_do_not_become_s3s(caplog: pytest.LogCaptureFixture) -> None:
    """transformers put adam_beta1 and adam_beta2, (0.9, 0.999), where a file has "auto"; |u| reached 3."""
    register()
    for kind in ("S3", "s3"):
        assert filled("auto", [0.9, 0.999], kind) == (None, [])
        assert filled("auto", [0.95, 0.95], kind) == ([0.95, 0.95], [])  # of whoever sets them
        assert filled([0.9, 0.95], [0.9, 0.999], kind) == ([0.9, 0.95], [])
    assert [record.getMessage() for record in caplog.records] == [caplog.messages[0]] * 2
    assert '"auto" for the betas of S3 is its own default' in caplog.messages[0]
    assert filled("auto", [0.9, 0.999], "AdamW") == ([0.9, 0.999], [])
    assert len(filled([0.9, 0.95], [0.9, 0.999], "AdamW")[1]) == 1
    unregister()
    assert filled("auto", [0.9, 0.999])[0] == [0.9, 0.999]


def test_transformers_that_is_imported_after_register_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations.deepspeed as hugging_face

    before = list(sys.meta_path)
    monkeypatch.delitem(sys.modules, "transformers.integrations.deepspeed")
    register()
    (finder,) = [each for each in sys.meta_path if each not in before]
    unregister()
    assert sys.meta_path == before
    register()
    module = importlib.import_module("transformers.integrations.deepspeed")
    assert finder not in sys.meta_path and sys.meta_path == before
    assert module is not hugging_face and hasattr(module.HfTrainerDeepSpeedConfig.fill_match, "__wrapped__")
