"""Rehearsals: what is kept of a recipe, what is scaled down, and one for real."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from s3_megatron.errors import S3Error
from s3_megatron.jobs import compose, rehearse, runs
from s3_megatron.jobs.rehearse import scaled_down
from s3_megatron.jobs.trial import Interruption, Trial
from s3_megatron.watch.events import Train
from s3_megatron.watch.file import Writer


def test_the_layout_is_kept_and_the_rest_is_small():
    job = compose.load(
        "gpt2_7b", "slurm", ["layout.sequence_parallel=true", "flags=[--overlap-grad-reduce,--fp8-format,hybrid]"]
    )
    small = scaled_down(job)
    assert (job.ranks, small.ranks, small.data_parallel) == (32, 8, 2)
    for section in ("engine", "optimizer", "precision"):
        assert getattr(small.recipe, section) == getattr(job.recipe, section)
    kept, layout = job.recipe.layout, small.recipe.layout
    assert (layout.tensor, layout.pipeline, layout.recompute) == (kept.tensor, kept.pipeline, kept.recompute)
    assert kept.sequence_parallel and not layout.sequence_parallel
    assert small.recipe.flags == ("--overlap-grad-reduce",)
    assert small.recipe.schedule.clip_grad == job.recipe.schedule.clip_grad


@pytest.mark.parametrize("phases", [{"sign_iters": 9000, "transition_iters": 1000}, {"soft_start": 0.99}], ids=str)
def test_phases_of_a_long_run_are_not_the_rehearsals(phases: dict[str, float]):
    """It was refused, with no soft step left of 12."""
    settings = [f"optimizer.{name}={value}" for name, value in phases.items()]
    job = compose.load("gpt2_345m", "slurm", ["optimizer=softsignum", "optimizer.beta=0.8", *settings])
    optimizer = scaled_down(job).recipe.optimizer
    assert optimizer.complete(rehearse.ITERATIONS)["total_steps"] == rehearse.ITERATIONS
    assert (optimizer.beta, optimizer.soft_start, optimizer.sign_iters) == (0.8, rehearse.SOFT_START, None)


@pytest.mark.parametrize(("given", "rehearsed"), [(0.9, 0.25), (0.1, 0.1), (0.0, 0.0), (1.0, 1.0)])
def test_what_softens_is_killed_and_resumed_in_its_soft_phase(given: float, rehearsed: float):
    """With .9 of 12 iterations hard, none was soft: the first one has the highest temperature. 1 has no soft one."""
    for name in ("softsignum", "softmuon"):
        settings = [f"optimizer={name}", f"optimizer.soft_start={given}"]
        assert scaled_down(compose.load("gpt2_345m", "slurm", settings)).recipe.optimizer.soft_start == rehearsed
    assert rehearse.SOFT_START * rehearse.ITERATIONS < rehearse.SAVE_INTERVAL


def test_the_maps_steps_are_the_rehearsals_too():
    """They are no steps of the run, and were taken for some."""
    settings = ["optimizer=softmuon", "optimizer.num_ns_steps=7", "optimizer.total_steps=10000"]
    optimizer = scaled_down(compose.load("gpt2_345m", "slurm", settings)).recipe.optimizer
    assert (optimizer.num_ns_steps, optimizer.total_steps) == (7, None)


@pytest.mark.parametrize("tensor", [1, 2, 3, 8])
@pytest.mark.parametrize("pipeline", [1, 2, 3])
@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_whatever_the_layout_the_parts_divide(tensor: int, pipeline: int, cluster: str):
    job = compose.load("gpt2_345m", cluster, [f"layout.tensor={tensor}", f"layout.pipeline={pipeline}"])
    if tensor * pipeline > rehearse.MOST_RANKS:
        with pytest.raises(S3Error, match=f"is {tensor * pipeline} ranks, and a rehearsal has at most 8"):
            scaled_down(job)
        return
    small = scaled_down(job)
    model, schedule = small.recipe.model, small.recipe.schedule
    assert small.ranks <= 8 and small.ranks == small.model_parallel * small.data_parallel
    assert model.num_layers % pipeline == model.num_attention_heads % tensor == 0
    assert model.hidden_size % model.num_attention_heads == model.ffn_size % tensor == 0
    assert schedule.global_batch_size == 2 * small.micro_batch_size * small.data_parallel


def test_the_kill_falls_between_two_checkpoints_of_an_unfinished_run():
    assert rehearse.SAVE_INTERVAL < rehearse.KILL_AT < 2 * rehearse.SAVE_INTERVAL < rehearse.ITERATIONS


# S3 on two pipeline stages. SoftMuon on two data-parallel ranks, killed and resumed in its soft phase; beside it
# SoftSignum, in its hard one: by its own flags it is hard for .9 of the run.
REHEARSED = {
    "s3": ["layout.pipeline=2", "cluster.ranks_per_node=1"],
    "softmuon": ["optimizer=softmuon", "optimizer.scalar_optimizer=softsignum"],
}


@pytest.mark.distributed
@pytest.mark.parametrize("settings", REHEARSED.values(), ids=REHEARSED)
def test_a_rehearsal_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str]):
    """With dropout: the job's own script, its agent, a kill, the script again, equal losses.

    A difference would be an error: see the next test.
    """
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    settings = [*settings, "cluster.environment.NCCL_DEBUG=INFO"]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    found = rehearse.rehearse(compose.load("gpt2_345m", "slurm", settings), tmp_path / "runs", console)
    assert (found.ranks, found.loss_gap) == (2, 0)
    # The run gets a little further before the signal arrives, but hardly to the checkpoint of iteration 8.
    assert 1 <= found.iterations_lost <= rehearse.SAVE_INTERVAL
    text = console.export_text()
    for part in (
        "layout.pipeline",
        "the same",
        " in all on this machine: ",
        "SIGKILL to rank 1",
        "resumed from the checkpoint of iteration",
    ):
        assert part in text
    killed, undisturbed = sorted(runs.known_runs(), key=lambda run: run.path.name)
    assert killed.finished and undisturbed.finished
    verdicts = [json.loads(path.read_text())["verdict"] for path in killed.path.glob("attempts/*/*.json")
                if "failures" not in path.name]  # fmt: skip
    assert sorted(verdicts) == ["failed", "finished"]
    log = (killed.path / "logs/job.log").read_text()
    assert 'environment: CUDA_VISIBLE_DEVICES=""' in log
    # Of the killed run, once; it goes on where it was.
    assert log.count("SoftMuon is soft from step 4 on, for 9 steps") == ("optimizer=softmuon" in settings)


@pytest.mark.parametrize(
    ("shift", "resumed_from", "message"),
    [
        (1e-9, 4, "a resume changes the losses of this recipe: compare .*-undisturbed/watch and .*-killed/watch"),
        (0.0, 0, "lost more than the 4 iterations between two saves: see .*-killed/logs/job.log"),
    ],
)
def test_a_resume_that_is_not_exact_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float, resumed_from: int, message: str
):
    def write(run: Path, shift: float) -> None:
        for i in range(1, rehearse.ITERATIONS + 1):
            Writer(run / "watch").write(Train(i, {"lm_loss": 8 - 0.1 * i + shift}))

    def killed(trial: Trial, kill_at: int, console: Console) -> Interruption:
        write(trial.run, shift)
        return Interruption(kill_at, resumed_from)

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(Trial, "train", lambda trial, console: write(trial.run, 0.0))
    monkeypatch.setattr(Trial, "train_through_a_kill", killed)
    with pytest.raises(S3Error, match=message):
        rehearse.rehearse(compose.load("gpt2_tiny", "local"), tmp_path / "runs", Console(quiet=True))
