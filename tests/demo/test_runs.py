"""From the recipe to the scripts of the demonstration's runs."""

import shlex
from pathlib import Path

import pytest
from rich.console import Console

from s3_megatron.demo.__main__ import demonstrate
from s3_megatron.demo.engines import ENGINES
from s3_megatron.demo.runs import RIVALS, kill_at, load, with_data
from s3_megatron.errors import S3Error
from s3_megatron.jobs.flags import ENTRIES
from s3_megatron.jobs.forecast import Forecast
from s3_megatron.jobs.recipe import Data
from s3_megatron.jobs.trial import Trial


@pytest.fixture(autouse=True)
def _own_list_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def command(folder: Path, engine: str, optimizer: str = "s3", gpus: int = 0) -> list[str]:
    """What the run's script starts: the node agent, torchrun, and the flags of the ranks."""
    data = Data(train="/corpus/train", validation="/corpus/validation", tokenizer_model="/corpus/tokenizer.model")
    job = with_data(load(optimizer, engine, gpus), data)
    shell, script = Trial.of(job, folder / f"{engine}-{optimizer}", "S3", Forecast(print, 1, 1)).command
    assert shell == "bash"
    before, _, started = Path(script).read_text().partition("exec ")
    return shlex.split(started) + shlex.split(before.partition("train=(")[2].partition("\n)")[0])


def value(flags: list[str], name: str) -> str:
    return flags[flags.index(name) + 1]


def test_the_recipe_chooses_the_engine(tmp_path: Path):
    """Both get the same flags but for what is their own; a checkpoint's format is Megatron's affair."""
    assert load("s3", None).recipe.engine == "megatron"
    megatron, deepspeed = command(tmp_path, "megatron"), command(tmp_path, "deepspeed")
    assert (tmp_path / "deepspeed-s3/deepspeed.json").read_text().count('"stage": 1')
    own = {ENTRIES["megatron"], "--use-distributed-optimizer", "--ckpt-format", "torch_dist"}
    assert set(megatron) - set(deepspeed) == own
    assert set(deepspeed) - set(megatron) == {*(ENTRIES["deepspeed"], "--deepspeed-config", "$run/deepspeed.json")}
    assert ENGINES.keys() == ENTRIES.keys()


def test_the_runs_differ_in_their_optimizers_and_folders_alone(tmp_path: Path):
    s3, adamw = command(tmp_path, "megatron"), command(tmp_path, "megatron", "adamw")
    assert value(s3, "--train-data-path") == value(adamw, "--train-data-path") == "/corpus/train"
    assert "--mock-data" not in s3
    rates = ["0.003", "0.0003", "0.01"], ["0.0003", "3e-05", "0.1"]
    assert set(s3) - set(adamw) <= {"s3", "--s3-beta", "0.95", "--s3-p", "3", *rates[0]}
    assert set(adamw) - set(s3) <= {"adam", "--adam-beta1", "0.9", "--adam-beta2", "0.999", *rates[1]}
    for flags, expected in zip((s3, adamw), rates, strict=True):
        assert [value(flags, name) for name in ("--lr", "--min-lr", "--weight-decay")] == expected


@pytest.mark.parametrize(("gpus", "ranks", "micro_batch"), [(0, 2, "8"), (1, 1, "16"), (6, 4, "4"), (8, 8, "2")])
def test_ranks_share_the_batch_evenly(tmp_path: Path, gpus: int, ranks: int, micro_batch: str):
    job = load("s3", "megatron", gpus)
    assert (job.ranks, job.rehearsed) == (ranks, not gpus)
    flags = command(tmp_path, "megatron", gpus=gpus)
    assert f"--nproc-per-node={ranks}" in flags and value(flags, "--micro-batch-size") == micro_batch
    assert ("--no-rope-fusion" in flags) == bool(gpus), "the rehearsal adds its own"


def test_the_kill_falls_between_two_checkpoints():
    assert kill_at(load("s3", None).recipe) == 80


def test_softsignum_is_killed_and_resumed_in_its_soft_phase():
    """By its recipe it is hard for 115 of 128 iterations, and the kill fell into these."""
    recipe = load("softsignum", None).recipe
    kill, interval = kill_at(recipe), recipe.checkpoint.save_interval
    assert recipe.optimizer.soft_start * recipe.schedule.train_iters <= kill // interval * interval < kill


def test_every_demonstration_has_its_own_folder():
    folders = [engine.results_of(optimizer) for engine in ENGINES.values() for optimizer in RIVALS]
    assert folders == ["demo", "demo-softsignum", "demo-deepspeed", "demo-deepspeed-softsignum"]


def test_what_is_not_there_is_refused_with_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(S3Error, match="optimizer 'lion' is not demonstrated: take s3 or softsignum"):
        demonstrate(Console(quiet=True), None, "lion")
    with pytest.raises(S3Error, match=r"engine = \"fsdp\": .*'megatron' or 'deepspeed'"):
        demonstrate(Console(quiet=True), "fsdp")
    assert not list(tmp_path.iterdir()), "refused before anything is built"


def test_gpt2_tiny_is_small_and_says_every_loss():
    recipe = load("s3", None).recipe
    assert recipe.model.num_layers == 4 and 128 <= recipe.model.hidden_size <= 256
    assert recipe.optimizer.weight_decay is None, "it is computed"
    assert recipe.schedule.global_batch_size % 2 == 0 and recipe.log.log_interval == 1
