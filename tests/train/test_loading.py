"""What a start says, and leaves behind, of a checkpoint that it cannot load."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from s3_megatron.checkpoints.whole import LOAD_FAILED
from s3_megatron.errors import S3Error
from s3_megatron.train.loading import LoadError, _compares_schedules, _without_optimizer, watched

TORN = RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory")


def fails(folder: Path, error: BaseException) -> str:
    """The one line of a load that raised ``error``."""
    with pytest.raises((LoadError, S3Error)) as refused, watched(lambda: folder):
        raise error
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, S3Error) == isinstance(error, AssertionError)
    return str(refused.value)


@pytest.mark.parametrize("error", [EOFError("ran out"), OSError(5, "Input/output error"), TORN])
@pytest.mark.parametrize("gathered", [False, True])
def test_damage_is_marked_in_a_job_and_answered_with_advice_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, gathered: bool
) -> None:
    """torch gathers what ranks raise while they read in a CheckpointException, which derives from BaseException."""
    seen: BaseException = CheckpointException("load", {1: (error, None)}) if gathered else error
    monkeypatch.delenv("S3_RUN_DIR", raising=False)
    assert "--ckpt-step" in fails(tmp_path, seen)
    assert not (tmp_path / LOAD_FAILED).exists()
    monkeypatch.setenv("S3_RUN_DIR", str(tmp_path))
    assert "the next start tries the one before it" in fails(tmp_path, seen)
    assert (tmp_path / LOAD_FAILED).read_text().startswith(f"{type(error).__name__}: ")


def test_damage_on_a_full_disk_is_named_although_it_cannot_be_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only line was that load_failed could not be written, and its exit code 2 ended the job for good."""
    monkeypatch.setenv("S3_RUN_DIR", str(tmp_path))
    (tmp_path / LOAD_FAILED).mkdir()  # root may write everywhere, so a folder stands in the way
    with pytest.raises(LoadError) as refused, watched(lambda: tmp_path):
        raise EOFError("ran out")
    said = str(refused.value)
    assert "EOFError: ran out; the next start tries it again, for " in said
    assert "load_failed cannot be written: Is a directory: move" in said and "\n" not in said


def test_a_state_of_another_optimizer_is_named_with_what_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Muon's checkpoint SoftMuon's run showed a KeyError with the names of all that is in it."""
    monkeypatch.setenv("S3_RUN_DIR", str(tmp_path))
    key = "chained_0.optimizer.state.exp_avg.linear_qkv.weight"
    missing = KeyError(f"{key} from model not in state dict: ['chained_0.optimizer.state.momentum_buffer.fc1.weight']")
    with pytest.raises(S3Error) as refused, watched(lambda: tmp_path):
        raise CheckpointException("load", {0: (missing, None)})
    said = str(refused.value)
    assert f"holds no {key}: another optimizer wrote its state" in said and "--no-load-optim" in said
    assert "momentum_buffer" not in said and not list(tmp_path.iterdir())


# What megatron-core 0.19.2 raises of a checkpoint that was saved under other flags, and what the line has of it.
MISFITS = [
    (
        KeyError(
            "optimizer.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.param from model not in state dict: ['a']"
        ),
        {"use_distributed_optimizer": False},
        ("--use-distributed-optimizer True, here False", "bucket_idx_0.param is not in it", "--no-load-optim"),
    ),
    (
        RuntimeError(
            "(TP, PP) mismatch after resume ((2, 1) vs (1, 1) from checkpoint): not supported for DistributedOptimizer "
            "with sharding type dp_reshardable. Please use `--ckpt-fully-parallel-save` flag during checkpoint saving."
        ),
        {"tensor_model_parallel_size": 2},
        ("--tensor-model-parallel-size 1, here 2", "--dist-ckpt-optim-fully-reshardable", "--no-load-optim"),
    ),
    (
        type("CheckpointingException", (Exception,), {})("ShardedTensor.flattened_range is not supported."),
        {"use_distributed_optimizer": False},
        ("True, here False", "flattened_range is not supported", "--no-load-optim"),
    ),
    (
        RuntimeError("Expected 2 entries in state dict, but got 3."),
        {"optimizer": "adam"},
        ("--optimizer s3, here adam",),
    ),
    (
        RuntimeError("Detected load from a distributed checkpoint, but neither --use-dist-ckpt nor ... is set."),
        {"ckpt_format": "torch"},
        ("pass --ckpt-format torch_dist",),
    ),
    (KeyError("state"), {"use_distributed_optimizer": False}, ("state is not in it", "--no-load-optim")),
    (KeyError("output_layer.weight"), {"num_layers": 2}, ("--num-layers 4, here 2", "output_layer.weight")),
    (
        type("CheckpointingException", (Exception,), {})("Global shape mismatch for key decoder.weight"),
        {"num_layers": 2},
        ("--num-layers 4, here 2",),
    ),
]


@pytest.mark.parametrize(("error", "changed", "parts"), MISFITS)
@pytest.mark.parametrize("gathered", [False, True])
def test_a_checkpoint_of_other_flags_is_one_line_that_names_them(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: Exception,
    changed: dict[str, Any],
    parts: tuple[str, ...],
    gathered: bool,
) -> None:
    """A resume without --use-distributed-optimizer, under other tensor parallelism, of a model with other layers or of
    SoftMuon's run was a traceback with a KeyError, and exit code 1: a job tried it again."""
    monkeypatch.setenv("S3_RUN_DIR", str(tmp_path))
    from s3_megatron.train import changes

    saved = {**changes.settings(SimpleNamespace(**ARGUMENTS)), "lr": 1e-3}
    start(monkeypatch, **changed, lr=1e-2, seed=5)
    seen: BaseException = CheckpointException("load", {1: (error, None)}) if gathered else error
    with pytest.raises(S3Error) as refused, watched(lambda: tmp_path, lambda: changes.that_bind(saved)):
        raise seen
    said = str(refused.value)
    for part in (str(tmp_path), *parts):
        assert part in said
    assert "\n" not in said and "--lr" not in said and "--seed" not in said and "fully-parallel-save" not in said
    assert not list(tmp_path.iterdir())


def test_what_no_changed_flag_explains_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another seed does not make a KeyError, and a peer that is lost says nothing of flags."""
    from s3_megatron.train import changes

    saved = changes.settings(SimpleNamespace(**ARGUMENTS))
    start(monkeypatch, seed=5)
    with pytest.raises(LoadError), watched(lambda: tmp_path, lambda: changes.that_bind(saved)):
        raise KeyError("output_layer.weight")
    # A share of soft steps, or a beta, was named as why SoftMuon's state is missing.
    hyperparameters = ("s3_beta", "softsignum_soft_start", "softmuon_soft_start", "softmuon_beta")
    saved |= dict.fromkeys(hyperparameters, 0.5)
    start(monkeypatch, **dict.fromkeys(hyperparameters, 0.6))
    with pytest.raises(LoadError), watched(lambda: tmp_path, lambda: changes.that_bind(saved)):
        raise KeyError("output_layer.weight")
    start(monkeypatch, num_layers=2)
    with pytest.raises(LoadError), watched(lambda: tmp_path, lambda: changes.that_bind(saved)):
        raise ConnectionResetError("a peer is gone")


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("num_layers value from checkpoint (4) is not equal to the input argument value (2)"),
        KeyError("optimizer"),
        RuntimeError("Error(s) in loading state_dict: size mismatch"),
        ConnectionResetError("a peer is gone"),
        CheckpointException("load", {0: (ValueError("Size mismatch"), None)}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_says_nothing_of_the_files_marks_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Another model, or a lost peer: the checkpoint is whole, and the next start must not pass over it."""
    monkeypatch.setenv("S3_RUN_DIR", str(tmp_path))
    assert str(tmp_path) in fails(tmp_path, error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["optimizer", "opt_param_scheduler"])
def test_a_checkpoint_of_weights_alone_is_answered_with_the_flag_that_takes_it(tmp_path: Path, key: str) -> None:
    """After --no-save-optim a resume was KeyError: 'optimizer', of any optimizer."""
    with (
        pytest.raises(S3Error, match=r"holds no optimizer state.*--no-load-optim"),
        _without_optimizer(lambda: tmp_path),
    ):
        raise KeyError(key)
    with pytest.raises(KeyError, match="another"), _without_optimizer(lambda: tmp_path):
        raise KeyError("another")


def scheduler() -> Any:
    """Megatron's class, imported when a test runs: whoever only collects this file is spared it."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler


def schedule(**settings: Any) -> Any:
    """Megatron's own, of 10 samples."""
    usual = {"init_lr": 0.0, "max_lr": 1e-3, "min_lr": 0.0, "lr_warmup_steps": 0, "lr_decay_steps": 10}
    decay = {"start_wd": 0.1, "end_wd": 0.1, "wd_incr_steps": 10, "wd_incr_style": "constant"}
    flags = {"use_checkpoint_opt_param_scheduler": False, "override_opt_param_scheduler": False}
    groups = SimpleNamespace(param_groups=[{}])
    return scheduler()(groups, **{**usual, "lr_decay_style": "cosine", **decay, **flags, **settings})


def test_another_schedule_is_one_line_with_every_value_and_the_flags_that_help() -> None:
    """Megatron asserts on the first difference alone, by names that no flag has."""
    load = _compares_schedules(scheduler().load_state_dict)
    saved = {**schedule().state_dict(), "num_steps": 4}
    longer = {"lr_decay_steps": 20, "wd_incr_steps": 20, "max_lr": 2e-3}
    with pytest.raises(S3Error) as refused:
        load(schedule(**longer), saved)
    for part in ("--lr 0.001, here 0.002", "in samples 10, here 20", "--override-opt-param-scheduler to", "--use-"):
        assert part in str(refused.value)
    rates = {}
    for name, settings in {
        "same": {},
        "override": {**longer, "override_opt_param_scheduler": True},
        "keep": {**longer, "use_checkpoint_opt_param_scheduler": True},
    }.items():
        resumed = schedule(**settings)
        load(resumed, saved)
        rates[name] = resumed.optimizer.param_groups[0]["lr"]
    assert rates["same"] == rates["keep"] < 1e-3 < rates["override"]


def test_every_value_that_megatrons_schedule_saves_has_its_flag_in_the_line() -> None:
    saved = schedule().state_dict()
    changed = {key: f"not {value}" for key, value in saved.items() if key != "num_steps"}
    with pytest.raises(S3Error) as refused:
        _compares_schedules(scheduler().load_state_dict)(schedule(), changed)
    assert str(refused.value).count(", here ") == len(changed)


def start(monkeypatch: pytest.MonkeyPatch, **given: Any) -> None:
    """Let this process be a run with these arguments."""
    monkeypatch.setattr("megatron.training.global_vars._GLOBAL_ARGS", SimpleNamespace(**{**ARGUMENTS, **given}))


ARGUMENTS: dict[str, Any] = {
    "optimizer": "s3",
    "ckpt_format": "torch_dist",
    "num_layers": 4,
    "tensor_model_parallel_size": 1,
    "lr_decay_style": "WSD",
    "lr_wsd_decay_iters": 10,
    "lr_wsd_decay_samples": None,
    "lr_wsd_decay_style": "exponential",
    "lr_warmup_init": 0.0,
    "lr_warmup_iters": 4,
    "lr_warmup_samples": 0,
    "lr_warmup_fraction": None,
    "override_opt_param_scheduler": False,
    "use_checkpoint_opt_param_scheduler": False,
    "no_load_optim": None,
    "finetune": False,
    "use_distributed_optimizer": True,
    "dist_ckpt_optim_fully_reshardable": False,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "seed": 1234,
    "clip_grad": 1.0,
    "split": "969,30,1",
    "data_path": ["a", "b"],
    "rampup_batch_size": None,
    "params_dtype": torch.float32,
    "log_interval": 1,
    "rank": 0,
    "_private": 1,
    "tokenizer": object(),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr_wsd_decay_iters", 20),
        ("lr_wsd_decay_samples", 8),
        ("lr_wsd_decay_style", "cosine"),
        ("lr_warmup_init", 1e-5),
    ],
)
def test_a_part_of_the_schedule_that_megatron_does_not_save_is_compared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: Any
) -> None:
    """--lr-wsd-decay-iters, its style, and --lr-warmup-init changed the rates of a resumed run in silence."""
    from s3_megatron.train import changes

    saved = changes.settings(SimpleNamespace(**ARGUMENTS))
    flag = f"--{name.replace('_', '-')}"
    for flags in ({}, {"use_checkpoint_opt_param_scheduler": True}):  # which Megatron has nothing to go by for
        start(monkeypatch, **{name: value}, **flags)
        with pytest.raises(S3Error) as refused:
            changes.compare(saved)
        assert f"({flag} {ARGUMENTS[name]}, here {value})" in str(refused.value)
        assert "pass --override-opt-param-scheduler" in str(refused.value)
    unused = {"lr_warmup_iters": 0} if name == "lr_warmup_init" else {"lr_decay_style": "cosine"}
    for flags in ({"override_opt_param_scheduler": True}, {"no_load_optim": True}, unused):
        caplog.clear()
        start(monkeypatch, **{name: value}, **flags)
        changes.compare({**saved, **unused})
        assert f"{flag} {ARGUMENTS[name]}, here {value}" in caplog.text, "in a line all the same"


@pytest.mark.parametrize("name", ["expert_model_parallel_size", "expert_tensor_parallel_size"])
def test_experts_move_to_other_ranks_where_the_state_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """In Megatron's default form it was a KeyError of torch's with every key of the checkpoint."""
    from s3_megatron.train import changes

    saved, flag = changes.settings(SimpleNamespace(**ARGUMENTS)), f"--{name.replace('_', '-')} 1, here 2"
    start(monkeypatch, **{name: 2})
    with pytest.raises(S3Error, match=rf"\({flag}\).*--dist-ckpt-optim-fully-reshardable.*--no-load-optim"):
        changes.compare(saved)
    changes.compare({**saved, "dist_ckpt_optim_fully_reshardable": True})
    for flags in ({"no_load_optim": True}, {"finetune": True}, {"use_distributed_optimizer": False}):
        caplog.clear()
        start(monkeypatch, **{name: 2}, **flags)
        changes.compare(saved)
        assert flag in caplog.text


def test_what_differs_is_one_line_and_what_computes_nothing_is_not_in_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from s3_megatron.train import changes

    saved = changes.settings(SimpleNamespace(**ARGUMENTS))
    beside = {"log_interval": 9, "rank": 3, "_private": 2, "tokenizer": object()}
    start(monkeypatch, **beside, data_path=("a", "b"), new_flag=1)
    changes.compare(saved)
    assert not caplog.records
    start(monkeypatch, **beside, seed=1, clip_grad=0.5, split="90,5,5", data_path=["b"], params_dtype=torch.bfloat16)
    changes.compare(saved)
    (record,) = caplog.records
    for part in ("--seed 1234, here 1", "--clip-grad 1.0, here 0.5", "--split 969,30,1, here 90,5,5", "here ['b']"):
        assert part in record.getMessage()
    assert record.getMessage().count(", here ") == 5


def test_every_value_of_megatrons_schedule_is_compared() -> None:
    """The scheduler's arguments are either in its state or among those that are compared by their flags."""
    taken = set(inspect.signature(scheduler()).parameters)
    not_the_schedule = {"optimizer", "use_checkpoint_opt_param_scheduler", "override_opt_param_scheduler"}
    unsaved = taken - not_the_schedule - set(schedule().state_dict())
    assert unsaved == {"init_lr", "wsd_decay_steps", "lr_wsd_decay_style"}, "changes._UNSAVED has their flags"


@pytest.mark.parametrize(
    ("given", "iteration", "announced"),
    [({}, 8, True), ({}, 9, True), ({}, 7, False), ({"skip_train": True}, 8, False)],
)
def test_a_run_that_has_nothing_left_to_train_is_announced(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    given: dict[str, Any],
    iteration: int,
    announced: bool,
) -> None:
    """The same command once more ended with exit code 0 and without a line, as if it had trained."""
    from megatron.training import training

    from s3_megatron.train.loading import watches_megatron

    monkeypatch.setattr(training, "load_checkpoint", lambda: (iteration, 0))
    start(monkeypatch, **{"train_iters": 8, "skip_train": False, "load": "DIR", **given})
    with watches_megatron():
        assert training.load_checkpoint() == (iteration, 0)
    line = f"nothing is left to train: --load DIR is at iteration {iteration}, and --train-iters is 8; to go on give"
    assert (line in caplog.text) == announced
