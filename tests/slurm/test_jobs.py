"""Jobs through what happens to them on a cluster: a real SLURM, real nodes that die, a real training run.

Every interrupted run must end as the uninterrupted one does, loss by loss and bit by bit, in the iterations that it did
before, after, and twice.
"""

import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from s3_megatron import cli
from s3_megatron.errors import S3Error
from s3_megatron.jobs import compose, status, submit
from s3_megatron.jobs.node import verdict
from s3_megatron.jobs.runs import Run
from s3_megatron.watch.events import Train
from s3_megatron.watch.file import Tail, read_metrics
from tests.slurm.cluster import OVER, Cluster

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS, SAVE_INTERVAL = 60, 10
# Iterations of about a third of a second on two cores: time enough to act in.
PAYLOAD = [
    *("layout.nodes=2", "model.num_layers=2", "model.hidden_size=128", "model.num_attention_heads=4"),
    *("model.seq_length=128", "model.vocab_size=1024", "model.hidden_dropout=0.1"),
    *("schedule.global_batch_size=8", f"schedule.train_iters={ITERATIONS}", "schedule.eval_interval=1000"),
    *("schedule.eval_iters=1", f"checkpoint.save_interval={SAVE_INTERVAL}"),
    "checkpoint.save_retain_interval=null",
]
RANK = "python[^ ]* -u -m s3_megatron.train.pretrain_gpt"  # as torchrun starts it; its own command line has no -u


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run did."""

    losses: dict[int, float]
    seconds: float  # one iteration

    def patience(self, starts: float) -> float:
        """How many seconds a run may take that does its iterations once and starts so many times."""
        return ITERATIONS * self.seconds * 2 + starts * 90


@pytest.fixture(autouse=True)
def login_node(running_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the package's own calls of SLURM's commands reach this cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", running_cluster.env["SLURM_CONF"])
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


def arguments(folder: Path, *settings: str) -> list[str]:
    ours = [f"cluster.runs_dir={folder}", f"cluster.data_dir={folder}", f"cluster.python={sys.executable}"]
    return [*PAYLOAD, *ours, "cluster.shared_dirs=[/]", *settings]


def start(folder: Path, *settings: str) -> Run:
    """Submit without the checks, which take 10 s and have tests of their own."""
    job = compose.load("gpt2_tiny", str(ROOT / "tests/slurm/rehearsal.yaml"), arguments(folder, *settings))
    return submit.submit(job, submit.folder(job, "run"))


def trained(run: Run) -> list[tuple[int, float]]:
    """Every iteration that was done, in order, with its loss; one that was done twice is there twice."""
    events = Tail(run.path / "watch", from_start=True).events()
    return [(event.iteration, event.losses["lm_loss"]) for event in events if isinstance(event, Train)]


def reaches(cluster: Cluster, run: Run, iteration: int) -> None:
    """Wait until the run has done ``iteration``."""
    done: Callable[[], bool] = lambda: any(number >= iteration for number, _ in trained(run))  # noqa: E731
    cluster.wait_for(done, 400, f"iteration {iteration}", run.path)


def finishes(cluster: Cluster, run: Run, reference: Reference, starts: float = 3) -> int:
    """Wait for the end; checks every loss, and returns how many iterations were done twice."""
    over: Callable[[], bool] = lambda: run.finished or run.ended is not None  # noqa: E731
    cluster.wait_for(over, reference.patience(starts), "the end of the run", run.path)
    assert run.finished, run.ended
    jobs_over: Callable[[], bool] = lambda: all(cluster.state(job) in OVER for job in run.job_ids)  # noqa: E731
    cluster.wait_for(jobs_over, 60, "the end of its jobs", run.path)
    done = trained(run)
    assert {iteration for iteration, _ in done} == reference.losses.keys()
    assert [loss for _, loss in done] == [reference.losses[iteration] for iteration, _ in done]
    assert status.status(run).state == "finished"
    return len(done) - len(reference.losses)


def verdicts(run: Run) -> list[str]:
    """How each start ended on its nodes, in order."""
    return [one["verdict"] for attempt in run.attempts() for one in verdict.read(attempt).values()]


@pytest.fixture(scope="module")
def first(running_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A run that nothing disturbs, submitted as a person does; and what the command printed."""
    folder = tmp_path_factory.mktemp("runs")
    settings = [word for setting in arguments(folder, "cluster.health.allreduce=true") for word in ("--set", setting)]
    recipe = ["gpt2_tiny", "--cluster", str(ROOT / "tests/slurm/rehearsal.yaml"), "--name", "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", running_cluster.env["SLURM_CONF"])
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        patch.setenv("WANDB_API_KEY", "hunter2-hunter2")
        submitted = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["submit", *recipe, *settings])
        assert submitted.exit_code == 0, submitted.output + repr(submitted.exception)
        run = Run(folder / "run")
        running_cluster.wait_over(run.job_ids[0], 1200, run.path)
    assert run.finished, (run.path / "logs/job.log").read_text()
    return run, submitted.stdout


@pytest.fixture
def reference(first: tuple[Run, str]) -> Reference:
    train = read_metrics(first[0].path / "watch").train
    seconds = statistics.median(event.seconds for event in train.values() if event.seconds is not None)
    return Reference({iteration: event.losses["lm_loss"] for iteration, event in train.items()}, seconds)


def test_a_job_on_two_nodes_trains_to_the_end(cluster: Cluster, first: tuple[Run, str]):
    run, printed = first
    assert "#SBATCH --nodes=2" in printed and f"as job {run.job_ids[0]}" in printed
    assert cluster.state(run.job_ids[0]) == "COMPLETED"
    assert [iteration for iteration, _ in trained(run)] == list(range(1, ITERATIONS + 1))
    found = status.status(run)
    assert (found.state, found.iteration, found.restarts, found.error) == ("finished", ITERATIONS, 0, None)
    assert found.saved.iteration == ITERATIONS and found.tokens_per_second is not None
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, ["status", str(run.path)]).stdout
    assert "finished" in shown and f"{ITERATIONS} of {ITERATIONS}" in shown
    logs = CliRunner().invoke(cli.app, ["logs", str(run.path)]).stdout
    assert "job: " in logs and re.search(r"^node1: \[local_rank0\]:.*S3 active in DistributedOptimizer", logs, re.M)
    assert re.search(r"^node2: \[local_rank0\]:", logs, re.M)
    assert sorted(path.name for path in run.path.glob("attempts/*/*.health.json")) == [
        "node1.health.json",
        "node2.health.json",
    ]
    assert verdicts(run) == ["finished", "finished"]


def test_no_secret_of_the_submitting_shell_is_in_the_run_folder(first: tuple[Run, str]):
    """WANDB_API_KEY was set when the first run was submitted, and reached its ranks through SLURM."""
    for path in first[0].path.rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path


def test_near_its_time_limit_a_job_saves_and_is_requeued(cluster: Cluster, tmp_path: Path, reference: Reference):
    """Training ends one minute after its start, and SIGTERM comes 50 to 80 s after it: SLURM looks every 30 s.

    A validation after every iteration makes the run longer than that where its iterations do not, and changes no
    training loss. How many batches it takes depends on the machine: thirty for all made 60 iterations into 13 starts
    where bf16 was slow, and this test did not end. A batch without its backward pass takes a third of an iteration.
    """
    in_a_start = 40  # seconds of training in a start, less what its ranks import
    batches = round(3 * (2 * in_a_start / ITERATIONS / reference.seconds - 1))
    limit = ["cluster.slurm.time_limit_minutes=2", "cluster.restart.signal_seconds=40"]
    run = start(tmp_path, *limit, *(["schedule.eval_interval=1", f"schedule.eval_iters={batches}"] * (batches > 0)))
    starts = 2 + ITERATIONS * max(reference.seconds, 2 * in_a_start / ITERATIONS) / in_a_start
    assert finishes(cluster, run, reference, starts) == 0, "nothing is lost: it saved"
    assert cluster.restarts(run.job_ids[0]) >= 1
    assert set(verdicts(run)) == {"saved", "finished"}


def test_a_dead_node_costs_one_save_interval_at_most(cluster: Cluster, tmp_path: Path, reference: Reference):
    """At a site where sbatch hands nothing of the submitting shell on, and srun nothing of the job's."""
    run = start(tmp_path, "cluster.slurm.options=[--export=NONE]")
    reaches(cluster, run, SAVE_INTERVAL + 5)
    dead = cluster.nodes_of(run.job_ids[0])[1]
    cluster.poweroff(dead)
    assert 0 < finishes(cluster, run, reference) <= SAVE_INTERVAL
    assert dead not in cluster.nodes_of(run.job_ids[0])


def test_a_start_that_ends_while_the_controller_is_away_is_requeued_when_it_is_back(
    cluster: Cluster, tmp_path: Path, reference: Reference
):
    """``set -e`` ended the script at the first squeue that failed: no requeue, no ENDED."""
    run = start(tmp_path)
    reaches(cluster, run, SAVE_INTERVAL + 5)
    victim = cluster.nodes_of(run.job_ids[0])[1]
    cluster.poweroff("controller")
    cluster.exec(victim, "pkill", "-KILL", "-f", RANK)
    log = run.path / "logs/job.log"
    cluster.wait_for(lambda: "failed, again in 10 s: squeue" in log.read_text(), 120, "patience", run.path)
    cluster.revive()
    assert 0 < finishes(cluster, run, reference) <= SAVE_INTERVAL
    assert cluster.restarts(run.job_ids[0]) == 1


def test_a_killed_rank_is_named_and_the_chain_goes_on(cluster: Cluster, tmp_path: Path, reference: Reference):
    """Where requeueing is forbidden the next job of the chain goes on, and its end takes the others away."""
    run = start(tmp_path, "cluster.restart.how=chain", "cluster.restart.max_restarts=3")
    assert len(run.job_ids) == 4
    reaches(cluster, run, SAVE_INTERVAL + 5)
    victim = cluster.nodes_of(run.job_ids[0])[1]
    cluster.exec(victim, "pkill", "-KILL", "-f", RANK)
    cluster.wait_for(lambda: "failed" in verdicts(run), 60, "a verdict", run.path)
    assert (status.status(run).error or "").startswith(f"rank 1 on {victim}: ended by SIGKILL")
    assert 0 < finishes(cluster, run, reference) <= SAVE_INTERVAL
    ended = [cluster.state(job) for job in run.job_ids]
    assert ended == ["FAILED", "COMPLETED", "CANCELLED", "CANCELLED"]


def test_a_pre_empted_job_saves_and_comes_back(cluster: Cluster, tmp_path: Path, reference: Reference):
    run = start(tmp_path, "cluster.slurm.partition=spot")
    reaches(cluster, run, SAVE_INTERVAL + 5)
    cluster.run("srun", "--partition=gpu", "--nodes=4", "--exclusive", "sleep", "5")
    assert finishes(cluster, run, reference) <= SAVE_INTERVAL
    assert cluster.restarts(run.job_ids[0]) == 1 and "saved" in verdicts(run)


def test_a_cancelled_run_stays_away_until_it_is_resumed(cluster: Cluster, tmp_path: Path, reference: Reference):
    run = start(tmp_path)
    reaches(cluster, run, SAVE_INTERVAL + 5)
    cancelled = CliRunner().invoke(cli.app, ["cancel", str(run.path)])
    assert cancelled.exit_code == 0 and f"cancelled job {run.job_ids[0]}" in cancelled.stdout
    assert cluster.wait_over(run.job_ids[0], 60, run.path) == "CANCELLED"
    assert status.status(run).state == "ended: cancelled with s3-megatron cancel"
    resumed = CliRunner().invoke(cli.app, ["resume", str(run.path)])
    assert resumed.exit_code == 0 and len(run.job_ids) == 2
    assert finishes(cluster, run, reference) <= SAVE_INTERVAL
    assert cluster.restarts(run.job_ids[0]) == 0, "the first job did not come back"


def test_a_second_job_in_a_run_folder_leaves_the_first_alone(cluster: Cluster, tmp_path: Path):
    """Both trained, and their iterations interleaved."""
    run = start(tmp_path)
    reaches(cluster, run, 1)
    second = cluster.submit(run.script)
    assert cluster.wait_over(second, 60, run.path) == "FAILED"
    assert f"refused: job {run.job_ids[0]}-0 " in (run.path / "logs/job.log").read_text()
    assert cluster.state(run.job_ids[0]) == "RUNNING" and run.ended is None
    assert (run.path / "chain").read_text().startswith("1 "), "it counts the first job's starts alone"


def test_a_plain_scancel_is_a_cancel(cluster: Cluster, tmp_path: Path):
    """The ranks save when they get SIGTERM, and the script is still there: it must not requeue the job."""
    run = start(tmp_path)
    reaches(cluster, run, 1)
    cluster.cancel(run.job_ids[0])
    assert cluster.wait_over(run.job_ids[0], 60, run.path) == "CANCELLED"
    assert "s3-megatron resume" in status.status(run).state


def test_a_configuration_error_ends_the_chain_at_once_and_status_says_why(cluster: Cluster, tmp_path: Path):
    """In a folder whose name a shell or sbatch would take apart."""
    folder = tmp_path / 'it\'s $(touch pwned) "50%" #1'
    run = start(folder, "flags=[--s3-beta,'1.5']")
    assert cluster.wait_over(run.job_ids[0], 120, run.path) == "FAILED"
    assert cluster.restarts(run.job_ids[0]) == 0
    assert run.ended is not None and run.ended.startswith("configuration error: ") and "beta" in run.ended
    assert status.status(run).state == f"ended: {run.ended}"
    assert not list(tmp_path.rglob("pwned"))


def test_a_hang_is_found_dumped_and_requeued(cluster: Cluster, tmp_path: Path, reference: Reference):
    run = start(tmp_path, "cluster.watchdog.hang_minutes=0.2")
    reaches(cluster, run, SAVE_INTERVAL + 5)
    victim = cluster.nodes_of(run.job_ids[0])[1]
    cluster.exec(victim, "pkill", "-STOP", "-f", RANK)
    assert 0 < finishes(cluster, run, reference) <= SAVE_INTERVAL
    assert cluster.restarts(run.job_ids[0]) == 1 and "hang" in verdicts(run)
    dumps = {path.name: path.read_text() for path in run.path.glob("attempts/*/hang/*.txt")}
    assert len(dumps) == 2 and all("s3_megatron/train/gpt.py" in text for text in dumps.values()), dumps
    assert "state: stopped" in dumps[f"{victim}-rank1.txt"]


def test_a_bad_node_is_found_before_training_and_left_out(cluster: Cluster, tmp_path: Path, reference: Reference):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    cluster.exec("node1", "mount", "-t", "tmpfs", "-o", "size=1m", "full", str(scratch))
    try:
        run = start(tmp_path, f"cluster.scratch_dir={scratch}")
        cluster.wait_for(lambda: list(run.path.glob("attempts/*/bad_nodes")), 60, "a bad node", run.path)
        assert (status.status(run).error or "").startswith("node1: ")
        assert finishes(cluster, run, reference) == 0
    finally:
        cluster.exec("node1", "umount", str(scratch))
    assert cluster.nodes_of(run.job_ids[0]) == ["node2", "node3"]


def test_too_few_nodes_without_the_bad_one_are_the_end(cluster: Cluster, tmp_path: Path):
    """A job that waits for a fourth node of three would wait for ever."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    cluster.exec("node4", "mount", "-t", "tmpfs", "-o", "size=1m", "full", str(scratch))
    try:
        run = start(tmp_path, f"cluster.scratch_dir={scratch}", "layout.nodes=4")
        assert cluster.wait_over(run.job_ids[0], 60, run.path) == "FAILED"
    finally:
        cluster.exec("node4", "umount", str(scratch))
    assert run.ended == "too few nodes are left without node4" and cluster.restarts(run.job_ids[0]) == 0


def test_two_starts_without_a_checkpoint_are_the_end(cluster: Cluster, tmp_path: Path):
    run = start(tmp_path, "cluster.watchdog.start_minutes=0.02")
    assert cluster.wait_over(run.job_ids[0], 120, run.path) == "FAILED"
    assert cluster.restarts(run.job_ids[0]) == 2
    assert run.ended is not None and "two starts in a row brought no checkpoint" in run.ended
    assert verdicts(run) == ["hang"] * 4


@pytest.mark.parametrize("example", sorted((ROOT / "launch/slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_the_examples_are_accepted_as_they_are(cluster: Cluster, example: Path):
    accepted = cluster.run("sbatch", "--test-only", str(example))
    nodes = re.search(r"--nodes=(\d+)", example.read_text())
    assert nodes and "--gpus-per-node=8" in example.read_text()
    assert f"using {int(nodes[1]) * 8} processors" in accepted.stderr, accepted.stderr


def test_what_slurm_refuses_leaves_nothing_behind(cluster: Cluster, tmp_path: Path):
    with pytest.raises(S3Error, match=r"sbatch refuses: .*partition"):
        start(tmp_path, "cluster.slurm.partition=gone")
    assert not list(tmp_path.iterdir())
