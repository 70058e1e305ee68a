"""From the configuration to Megatron's flags."""

from pathlib import Path

import pytest
from rich.console import Console

from s3_megatron.demo import recipe
from s3_megatron.demo.__main__ import demonstrate
from s3_megatron.demo.runs import Trainer
from s3_megatron.errors import S3Error

ROOT = Path(__file__).resolve().parents[2]
PAPER = {
    "adamw": {"lr": 3e-4, "weight_decay": 0.1, "betas": [0.9, 0.999]},
    "s3": {"lr_ratio": 10, "beta": 0.95, "p": 3},
}


def test_the_papers_rates_follow_from_the_papers_rule():
    """SPEC section 1: AdamW 3e-4 with 0.1 gives S3 at 3e-3 a decay of 0.01; for Lion's 6e-5 it would be 0.5."""
    assert recipe.s3_rates(PAPER) == (3e-3, 0.01)
    assert recipe.s3_rates({**PAPER, "s3": {"lr_ratio": 0.2}}) == (6e-5, 0.5)


def value(flags: list[str], name: str) -> str:
    return flags[flags.index(name) + 1]


def test_flags_of_both_optimizers():
    s3, adam = recipe.optimizer_flags("s3", PAPER), recipe.optimizer_flags("adam", PAPER)
    assert (value(s3, "--optimizer"), value(adam, "--optimizer")) == ("s3", "adam")
    assert (value(s3, "--lr"), value(s3, "--min-lr"), value(s3, "--weight-decay")) == ("0.003", "0.0003", "0.01")
    assert (value(adam, "--lr"), value(adam, "--min-lr"), value(adam, "--weight-decay")) == ("0.0003", "3e-05", "0.1")
    assert (value(s3, "--s3-beta"), value(s3, "--s3-p")) == ("0.95", "3")
    assert (value(adam, "--adam-beta1"), value(adam, "--adam-beta2")) == ("0.9", "0.999")


def test_the_recipe_chooses_the_engine(tmp_path: Path):
    """Both are told the same but for what is their own; a checkpoint's format is Megatron's affair."""
    config = recipe.load(ROOT / "configs/model/gpt2_tiny.yaml")
    assert config["engine"] == "megatron"

    def command(engine: str) -> list[str]:
        trainer = Trainer({**config, "engine": engine}, [], tmp_path, 0, Console(quiet=True))
        return trainer.command("s3", "s3")

    megatron, deepspeed = command("megatron"), command("deepspeed")
    assert value(megatron, "-m") == value(deepspeed, "-m") == "torch.distributed.run"
    assert "s3_megatron.train.pretrain_gpt" in megatron and "s3_megatron.train.pretrain_gpt_deepspeed" in deepspeed
    assert Path(value(deepspeed, "--deepspeed-config")).is_file()
    assert set(megatron) - set(deepspeed) == {
        *("s3_megatron.train.pretrain_gpt", "--use-distributed-optimizer", "--ckpt-format", "torch_dist"),
    }


def test_an_engine_that_is_not_there_is_refused_with_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(S3Error, match="engine is 'fsdp': it must be one of deepspeed, megatron"):
        demonstrate(Console(quiet=True), "fsdp")
    assert not list(tmp_path.iterdir()), "refused before anything is built"


def test_gpt2_tiny_is_what_the_issue_asks_for():
    config = recipe.load(ROOT / "configs/model/gpt2_tiny.yaml")
    model, run, optimizer = config["model"], config["run"], config["optimizer"]
    assert model["num_layers"] == 4 and 128 <= model["hidden_size"] <= 256
    assert "weight_decay" not in optimizer["s3"], "it is computed"
    lr, decay = recipe.s3_rates(optimizer)
    # Rounded to 12 digits each.
    assert lr == pytest.approx(10 * optimizer["adamw"]["lr"], rel=1e-12)
    assert lr * decay == pytest.approx(optimizer["adamw"]["lr"] * optimizer["adamw"]["weight_decay"], rel=1e-11)
    assert isinstance(optimizer["adamw"]["lr"], float), "YAML reads 1e-3 without a point as text"
    assert run["global_batch_size"] % 2 == 0 and run["log_interval"] == 1
