"""What the entry for DeepSpeed refuses before anything is built, in this process."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from s3_megatron import rehearsal
from s3_megatron.errors import S3Error
from s3_megatron.train import entry
from tests.engines.megatron.gpt import flags
from tests.launcher import ROOT
from tests.train import refusals


@pytest.fixture(scope="module")
def loop() -> Iterator[ModuleType]:
    """The entry's module in this process, on one rehearsed rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("DS_ACCELERATOR", "")  # so that what prepare() sets goes away
        entry.prepare([], rehearse=True)
        from s3_megatron.engines.megatron import uninstall
        from s3_megatron.train import deepspeed_loop

        yield deepspeed_loop
        uninstall()
        rehearsal.deactivate()


def refusal(loop: ModuleType, monkeypatch: pytest.MonkeyPatch, config: Path | None, *extra: str) -> str:
    file = [] if config is None else ["--deepspeed-config", str(config)]
    return refusals.refusal(loop.train, monkeypatch, *flags(iterations=1, extra=(*file, *extra)))


@pytest.mark.parametrize(
    "flag",
    [
        ("--overlap-grad-reduce",),
        ("--tensor-model-parallel-size", "2"),
        ("--finetune",),
        ("--rerun-mode", "report_stats"),
        ("--ckpt-format", "torch"),
        ("--log-params-norm",),
        ("--rampup-batch-size", "4", "4", "100"),
        # Of SoftMuon in Megatron, and of what moves the rest there.
        *(
            (*flag, "--optimizer", "softmuon")
            for flag in (
                ("--softmuon-tp-mode", "blockwise"),
                ("--softmuon-scalar-optimizer", "adam"),
                ("--s3-p", "2"),
                ("--s3-no-nesterov",),
            )
        ),
    ],
    ids=lambda flag: flag[0],
)
def test_what_would_do_nothing_is_refused(loop: ModuleType, monkeypatch: pytest.MonkeyPatch, flag: list[str]) -> None:
    line = refusal(loop, monkeypatch, ROOT / "configs/deepspeed/zero1.json", *flag)
    assert line.startswith(f"{flag[0]} ") and "does nothing under DeepSpeed" in line


def test_the_models_fused_qkv_weights_are_named_for_deepspeed(loop: ModuleType) -> None:
    """8 heads of 4 in 2 groups: 16 rows of Q, 4 of K and of V. Whatever is a matrix to Megatron is one."""
    import torch

    from s3_megatron.train.deepspeed_matrices import describe

    shape = SimpleNamespace(num_attention_heads=8, num_query_groups=2, kv_channels=4)
    model = torch.nn.Module()
    model.self_attention = torch.nn.Module()
    model.self_attention.linear_qkv = torch.nn.Linear(32, 48)
    model.embedding = torch.nn.Embedding(5, 32)
    model.embedding.weight.is_embedding_or_output_parameter = True
    model.positions = torch.nn.Embedding(7, 32)
    params: dict[str, Any] = {}
    describe(model, shape, params, split_qkv=True)
    assert params == {"split_qkv": {"*linear_qkv.weight": [16, 4, 4]}}
    marked = {name: param.use_muon for name, param in model.named_parameters()}
    assert [name for name, is_matrix in marked.items() if is_matrix] == [
        *("self_attention.linear_qkv.weight", "positions.weight")
    ]
    describe(model, shape, params, split_qkv=True)  # as a file may have it
    with pytest.raises(S3Error, match=r"the flags make it \{\}: leave it out of the file"):
        describe(model, shape, params, split_qkv=False)
    model.self_attention.requires_grad_(False)
    describe(model, shape, params := {}, split_qkv=True)
    assert params == {"split_qkv": {}}, "a pattern that fits nothing trained"


def test_the_file_must_be_there_and_be_json(loop: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "--deepspeed-config FILE is missing" in refusal(loop, monkeypatch, None)
    assert "none.json cannot be read" in refusal(loop, monkeypatch, tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"zero_optimization": ')
    assert "half.json cannot be read as JSON" in refusal(loop, monkeypatch, tmp_path / "half.json")


@pytest.mark.parametrize(
    ("settings", "flag", "found"),
    [
        ({"gradient_clipping": 0.5}, (), ("gradient_clipping = 0.5", "--clip-grad", "1.0")),
        ({"bf16": {"enabled": False}}, ("--bf16",), ("bf16.enabled = false", "--bf16", "true")),
        ({"train_batch_size": 16}, (), ("train_batch_size = 16", "--global-batch-size", "8")),
        ({"gradient_accumulation_steps": 2}, (), ("gradient_accumulation_steps = 2", "makes it 4")),
        (
            {"optimizer": {"type": "S3", "params": {"p": 2}}},
            ("--s3-p", "3"),
            ("optimizer.params.p = 2", "--s3-p", "3.0"),
        ),
        ({"scheduler": {"type": "WarmupLR"}}, (), ("scheduler", "--lr-decay-style")),
        ({"optimizer": {"type": "Lamb"}}, (), ("'Lamb'", '"S3"')),
        # DeepSpeed passes over a name that it does not know: the run was unsharded.
        ({"zero_optimisation": {"stage": 3}}, (), ("'zero_optimisation'", "'zero_optimization'")),
        # DeepSpeed itself refuses it by a NotImplementedError, once the model is built.
        ({"zero_optimization": {"stage": 0}}, ("--bf16",), ("ZeRO stage 0", "stage to 1", "--grad-reduce-in-bf16")),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
            (),
            ("zero_optimization.reduce_bucket_size",),
        ),
    ],
)
def test_a_file_that_contradicts_a_flag_is_refused(
    loop: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: dict[str, Any],
    flag: tuple[str, ...],
    found: tuple[str, ...],
) -> None:
    file = tmp_path / "ours.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, **settings}))
    line = refusal(loop, monkeypatch, file, *flag)
    assert str(file) in line and all(part in line for part in found)


@pytest.mark.parametrize(
    ("zero", "found"),
    [({"stage": 4}, "stage = 4: Input should be 0, 1, 2"), ({"stag": 1}, "stag = 1: Extra inputs")],
)
def test_what_deepspeed_refuses_in_the_file_is_one_line(zero: dict[str, int], found: str) -> None:
    """A mistyped key of zero_optimization was pydantic's traceback, and exit code 1: a job tried it again."""
    from deepspeed.runtime.zero.config import get_zero_config

    from s3_megatron.train.deepspeed_config import refusals as refused_by_deepspeed

    with pytest.raises(S3Error) as refused, refused_by_deepspeed(Path("ours.json")):
        get_zero_config({"zero_optimization": zero})
    assert str(refused.value).startswith("DeepSpeed refuses ours.json: DeepSpeedZeroConfig: ")
    assert found in str(refused.value) and "\n" not in str(refused.value)


MODEL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 32, "padded_vocab_size": 256}


OF_ADAM = {
    "latest": "iter_0000004",
    "iter_0000004/s3_megatron.json": {**MODEL, "world_size": 2, "zero_stage": 1, "settings": {"optimizer": "adam"}},
}


@pytest.mark.parametrize(
    ("files", "asked", "found"),
    [
        ({"latest_checkpointed_iteration.txt": "4"}, {}, "holds Megatron's checkpoints"),
        ({}, {"exit_on_missing_checkpoint": True}, "has no file 'latest'"),
        ({}, {"universal": True}, "has no file 'latest_universal'"),
        ({"latest": "iter_0000004"}, {}, "iter_0000004 is not a complete checkpoint"),
        ({}, {"ckpt_step": 8}, "iter_0000008 is not a complete checkpoint"),
        (
            {"latest": "iter_0000004", "iter_0000004/s3_megatron.json": {**MODEL, "world_size": 4, "zero_stage": 2}},
            {},
            "written with zero_stage 2 (this run: 1), world_size 4 (this run: 2): ",
        ),
        # Below ZeRO-3 the weights alone go anywhere, and the line says by which flag; they fit one model.
        (
            {"latest": "iter_0000004", "iter_0000004/s3_megatron.json": {**MODEL, "world_size": 4, "zero_stage": 2}},
            {},
            ", or pass --no-load-optim to go on from its weights",
        ),
        (
            {"latest": "iter_0000004", "iter_0000004/s3_megatron.json": {**MODEL, "world_size": 4, "zero_stage": 3}},
            {"no_load_optim": True},
            "written with zero_stage 3 (this run: 1), world_size 4 (this run: 2): ",
        ),
        (
            {
                "latest": "iter_0000004",
                "iter_0000004/s3_megatron.json": {**MODEL, "num_layers": 3, "world_size": 2, "zero_stage": 1},
            },
            {"no_load_optim": True},
            "written with num_layers 3 (this run: 2): ",
        ),
        ({}, {"universal": True, "no_load_optim": True, "ckpt_step": 8}, "take checkpoint.load_universal out"),
        # DeepSpeed's own refusal advised an argument of load_checkpoint, for which the entry has this flag.
        (OF_ADAM, {}, "--optimizer adam, here s3: give its value, pass --s3-from-adam to convert it, or pass --n"),
        (OF_ADAM, {"optimizer": "softsignum"}, "here softsignum: give its value, or pass --no-load-optim to go on fr"),
        # The name of a ZeRO file has bf16 in it: FileNotFoundError, and in a job the checkpoint was marked as damaged.
        (
            {
                "latest": "iter_0000004",
                "iter_0000004/s3_megatron.json": {**MODEL, "world_size": 2, "zero_stage": 1, "bf16": True},
            },
            {},
            "written with bf16 True (this run: False): ",
        ),
        (
            {"latest": "iter_0000016", "latest_universal": "iter_0000008_universal"},
            {"universal": True},
            "iter_0000016, which is newer than the universal iter_0000008_universal",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    loop: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    files: dict[str, Any],
    asked: dict[str, Any],
    found: str,
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    args = {**MODEL, "world_size": 2, "bf16": False, "fp16": False, "load": str(tmp_path)}
    args |= {"ckpt_step": None, "exit_on_missing_checkpoint": False, "no_load_optim": None}
    args |= {"optimizer": "s3", "s3_from_adam": False}
    monkeypatch.setattr(loop.deepspeed_checkpoint, "get_args", lambda: SimpleNamespace(**{**args, **asked}))
    engine = SimpleNamespace(
        load_universal_checkpoint=lambda: asked.get("universal", False), zero_optimization_stage=lambda: 1
    )
    with pytest.raises(S3Error) as refused:
        loop.deepspeed_checkpoint.load(engine, None)
    assert found in str(refused.value) and "\n" not in str(refused.value)


def test_only_checkpoints_of_the_runs_own_names_are_removed(loop: ModuleType, tmp_path: Path) -> None:
    """A run that went on from a folder that a person had named removed it, with everything in it, at its next save."""
    for name, is_kept in (("iter_0000004", True), ("iter_0000006", False), ("best", True), ("iter_best", True)):
        (tmp_path / name).mkdir()
        loop.deepspeed_checkpoint._prune(tmp_path, name, "iter_0000008", 4)
        assert (tmp_path / name).exists() == is_kept, name
