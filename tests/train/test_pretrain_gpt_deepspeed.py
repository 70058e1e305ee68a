"""The DeepSpeed entry on real ranks: Megatron's losses, resumed runs, and a killed rank."""

import json
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import pytest
from rich.console import Console

from s3_megatron.jobs import compose
from s3_megatron.jobs.forecast import Forecast
from s3_megatron.jobs.submit import here
from s3_megatron.jobs.trial import Trial
from s3_megatron.watch.events import Train
from s3_megatron.watch.file import Metrics, Tail, read_metrics
from tests.engines.megatron.gpt import flags
from tests.launcher import ROOT
from tests.ranks import ranks
from tests.trainings import Job, train_all

CONFIGS = ROOT / "configs/deepspeed"
STEPS, SHORT = 50, 8
SAVED = {STEPS: 40, SHORT: 4}  # where the resumed run starts

# Of the loss, relative. In fp32 the engines differ in the order in which they sum the norm that gradients are clipped
# by: 1.7e-7 was seen, and the issue wants 1e-5. In bf16 they are bit-equal until the last bit of a clipping factor
# turns the rounding of a weight, by 2^-9 of it; then the runs part slowly: 6.6e-5 was seen over 50 steps. Several times
# that is allowed, for other processors sum in other orders.
BOUND = {"fp32": 1e-5, "bf16": 5e-4}
WRAPPERS = {
    ("zero1", "bf16"): "BF16_Optimizer",  # it accumulates and reduces in float32, as Megatron does
    ("zero3", "bf16"): "DeepSpeedZeroOptimizer_Stage3",
}


@dataclass(frozen=True)
class Run:
    """One training run of a launch: an engine ("megatron", or a configuration of DeepSpeed's) and a precision."""

    engine: str
    precision: str
    steps: int = STEPS
    resumed: bool = False

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.precision}{'-resumed' * self.resumed}"

    def job(self, folder: Path) -> Job:
        """What trains it; metrics go to FOLDER/NAME.

        Dropout is on, the batch is accumulated, and most steps are clipped.
        """
        precision = None if self.precision == "fp32" else self.precision
        argv = flags(iterations=self.steps, precision=precision)
        argv += ["--num-layers", "1", "--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--clip-grad", "0.7"]
        argv += ["--watch-dir", str(folder / self.name)]
        if self.engine == "megatron":
            return "megatron", argv
        saved, checkpoints = SAVED[self.steps], str(folder / f"{self.engine}-{self.precision}" / "checkpoints")
        argv += ["--deepspeed-config", str(CONFIGS / f"{self.engine}.json")]
        if self.resumed:
            argv += ["--load", checkpoints, "--ckpt-step", str(saved)]
        elif self in RESUMED:
            argv += ["--save", checkpoints, "--save-interval", str(saved // 2), "--save-retain-interval", str(saved)]
        return "deepspeed", argv


def launch(runs: list[Run], nproc: int, folder: Path, *more: Job) -> dict[str, Metrics]:
    """Train ``runs`` and ``more`` jobs in one launch; returns the metrics of ``runs``."""
    train_all([*(run.job(folder) for run in runs), *more], nproc, folder)
    return {run.name: read_metrics(folder / run.name) for run in runs}


FULL = [Run(engine, precision) for precision in BOUND for engine in ("megatron", "zero1", "zero2")]
FULL += [Run("zero3", "bf16", SHORT), Run("zero2_offload", "bf16", SHORT)]
DEEPSPEED = [run for run in FULL if run.engine != "megatron"]
RESUMED = [Run("zero2", "fp32"), Run("zero1", "bf16"), Run("zero3", "bf16", SHORT)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


# What a run on more ranks left when it was killed while it saved.
TORN = "zero2-fp32/checkpoints/iter_0000040/zero_pp_rank_7_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def metrics(folder: Path) -> dict[str, Metrics]:
    """Every run on 2 ranks, from one launch."""
    (folder / TORN).parent.mkdir(parents=True)
    (folder / TORN).touch()
    resumed = [replace(run, resumed=True) for run in RESUMED]
    relaxed = [*softsignums(folder), *softmuons(folder)]
    return launch([*FULL, *resumed], 2, folder, *over_from_adam(folder), *relaxed)


def over_from_adam(folder: Path) -> list[Job]:
    """AdamW for 4 iterations, then S3 for as many from its checkpoint."""
    zero2, saved = ["--deepspeed-config", str(CONFIGS / "zero2.json")], str(folder / "adam-saved")
    adam = (
        flags(iterations=4, optimizer="adam")
        + zero2
        + ["--save", saved, "--save-interval", "4", "--watch-dir", str(folder / "adam")]
    )
    s3 = flags(iterations=8) + zero2 + ["--load", saved, "--s3-from-adam", "--watch-dir", str(folder / "from-adam")]
    return [("deepspeed", adam), ("deepspeed", s3), weights_of_adam(folder, "zero1"), weights_of_adam(folder)]


def weights_of_adam(folder: Path, engine: str = "zero2", watch: Path | None = None) -> Job:
    """S3 from the weights alone of what AdamW saved in ZeRO 2 on 2 ranks; metrics go to WATCH/weights-ENGINE."""
    argv = [*flags(iterations=8), "--deepspeed-config", str(CONFIGS / f"{engine}.json"), "--no-load-optim"]
    argv += ["--load", str(folder / "adam-saved"), "--watch-dir", str((watch or folder) / f"weights-{engine}")]
    return "deepspeed", argv


# SoftSignum's engines and precisions; it is hard for 4 iterations of 8, and goes on from either phase.
SOFT, PHASES = [("megatron", "bf16"), ("zero1", "bf16"), ("zero2", "bf16"), ("zero3", "bf16")], (2, 6)


def softsignums(folder: Path) -> list[Job]:
    """SoftSignum by a DeepSpeed file that names it, or by the flag; and, from both phases, once more."""
    jobs: list[Job] = []
    for engine, precision in SOFT:
        name = f"softsignum-{engine}-{precision}"
        argv = flags(iterations=8, optimizer="softsignum", precision=precision)
        argv += ["--num-layers", "1", "--softsignum-soft-start", "0.5"]
        if engine == "megatron":
            jobs.append(("megatron", [*argv, "--watch-dir", str(folder / name)]))
            continue
        config = json.loads((CONFIGS / f"{engine}.json").read_text())
        if engine == "zero2":
            config["optimizer"] = {"type": "SoftSignum", "params": {"lr": "auto", "weight_decay": "auto"}}
            argv = [word for word in argv if word not in ("--optimizer", "softsignum")]
        (folder / f"{name}.json").write_text(json.dumps(config))
        argv += ["--deepspeed-config", str(folder / f"{name}.json")]
        saved = str(folder / f"{name}-saved")
        jobs.append(("deepspeed", [*argv, "--save", saved, "--save-interval", "2", "--watch-dir", str(folder / name)]))
        for start in PHASES:
            watch = ["--watch-dir", str(folder / f"{name}-{start}")]
            jobs.append(("deepspeed", [*argv, "--load", saved, "--ckpt-step", str(start), *watch]))
    return jobs


def softmuons(folder: Path) -> list[Job]:
    """SoftMuon with S3 beside it, in the engines that have it; and from its soft phase once more."""
    jobs: list[Job] = []
    for engine in ("megatron", "zero1", "zero2"):
        name = f"softmuon-{engine}"
        saved = str(folder / f"{name}-saved")
        argv = flags(iterations=8, optimizer="softmuon", precision="bf16")
        argv += ["--num-layers", "1", "--softmuon-soft-start", "0.5"]
        entry = "deepspeed"
        if engine == "megatron":
            entry, argv = engine, [*argv, "--dist-ckpt-optim-fully-reshardable"]
        else:
            argv += ["--deepspeed-config", str(CONFIGS / f"{engine}.json")]
        jobs.append((entry, [*argv, "--save", saved, "--save-interval", "6", "--watch-dir", str(folder / name)]))
        jobs.append((entry, [*argv, "--load", saved, "--ckpt-step", "6", "--watch-dir", str(folder / f"{name}-6")]))
    return jobs


def gap(ours: Metrics, theirs: Metrics) -> float:
    """The largest relative difference of a training loss, over the iterations of ``ours``."""
    return max(abs(event.losses["lm_loss"] / theirs.train[i].losses["lm_loss"] - 1) for i, event in ours.train.items())


@pytest.mark.distributed
@pytest.mark.parametrize("run", DEEPSPEED, ids=lambda run: run.name)
def test_losses_are_megatrons(metrics: dict[str, Metrics], run: Run) -> None:
    """The same recipe, initial weights, data order, dropout and seed: each engine shards the same training."""
    ours, theirs = metrics[run.name], metrics[f"megatron-{run.precision}"]
    assert sorted(ours.train) == list(range(1, run.steps + 1))
    worst = gap(ours, theirs)
    print(f"{run.name}: losses differ from Megatron's by {worst:.1e} at most")
    assert worst <= BOUND[run.precision]
    # Of one and the same model: accumulated and reduced in bf16 it was off by 3.4e-5, and a wrong average shows as a
    # factor. S3 and the clipping would hide either from the losses.
    first = [metrics.train[1].grad_norm for metrics in (ours, theirs)]
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    for name in ("lr", "grad_norm", "updates.mean", "updates.max", "updates.agreement"):
        last = [attrgetter(name)(metrics.train[run.steps]) for metrics in (ours, theirs)]
        assert last[0] == pytest.approx(last[1], rel=1e-2), name
    if run.steps == STEPS:
        held_out = [metrics.validation[STEPS].losses["lm_loss"] for metrics in (ours, theirs)]
        assert held_out[0] == pytest.approx(held_out[1], rel=BOUND[run.precision])
    assert len({event.losses["lm_loss"] for event in ours.train.values()}) == run.steps, "the losses move"


@pytest.mark.distributed
@pytest.mark.parametrize("run", RESUMED, ids=lambda run: run.name)
def test_a_resumed_run_is_bit_equal(metrics: dict[str, Metrics], run: Run) -> None:
    """Weights, masters, m, r, schedule, data order and the dropout's generator are all restored."""
    resumed = metrics[f"{run.name}-resumed"]
    assert sorted(resumed.train) == list(range(SAVED[run.steps] + 1, run.steps + 1))
    assert gap(resumed, metrics[run.name]) == 0


@pytest.mark.distributed
@pytest.mark.parametrize("run", DEEPSPEED, ids=lambda run: run.name)
def test_what_is_logged_of_the_optimizer(metrics: dict[str, Metrics], run: Run) -> None:
    """m, r and the float32 masters, 12 bytes a parameter, are shared by two ranks; masters exist in fp32 too."""
    event, other = metrics[run.name].optimizer, metrics["megatron-fp32"].optimizer
    assert event is not None and other is not None
    assert event.wrapper == WRAPPERS.get((run.engine, run.precision), "DeepSpeedZeroOptimizer")
    assert event.parameters == other.parameters
    assert event.shard_elements == [event.parameters / 2] * 2, "this model needs no padding"
    assert (event.state_bytes_per_param_rank, event.master_bytes_per_param_rank) == (4.0, 2.0)
    # A first step moves every coordinate with a gradient by (1 - beta^2)^(2/3).
    first = metrics[run.name].train[1]
    assert first.updates.max == pytest.approx((1 - 0.95**2) ** (2 / 3), rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "precision"), SOFT[1:])
def test_softsignum_trains_through_its_switch_and_resumes(
    metrics: dict[str, Metrics], folder: Path, engine: str, precision: str
) -> None:
    """The length of the run is --train-iters, which DeepSpeed knew nothing of; losses are Megatron's, and a run that
    goes on from either phase is the uninterrupted one to the bit."""
    whole, theirs = (read_metrics(folder / f"softsignum-{name}") for name in (f"{engine}-{precision}", "megatron-bf16"))
    assert sorted(whole.train) == list(range(1, 9)) and whole.optimizer is not None
    assert whole.optimizer.state_bytes_per_param_rank == 2.0, "one state"
    means = [event.updates.mean for _, event in sorted(whole.train.items())]
    assert all(whole.train[i].updates.max == 1 for i in range(1, 6)) and means[7] < means[6] < means[5] < means[3]
    print(f"{engine} {precision}: losses differ by {gap(whole, theirs):.1e}")
    assert gap(whole, theirs) <= BOUND[precision]
    for start in PHASES:
        resumed = read_metrics(folder / f"softsignum-{engine}-{precision}-{start}")
        assert sorted(resumed.train) == list(range(start + 1, 9))
        assert gap(resumed, whole) == 0


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["megatron", "zero1", "zero2"])
def test_softmuon_trains_as_in_megatron_and_resumes(metrics: dict[str, Metrics], folder: Path, engine: str) -> None:
    """Both engines have the same matrices, learned positions among them, and Q, K and V apart: losses are Megatron's,
    and sizes of the updates, of S3's and SoftMuon's together, which were S3's alone."""
    whole, theirs, resumed = (read_metrics(folder / f"softmuon-{name}") for name in (engine, "megatron", f"{engine}-6"))
    assert sorted(whole.train) == list(range(1, 9)) and sorted(resumed.train) == [7, 8]
    print(f"{engine}: losses differ by {gap(whole, theirs):.1e}")
    assert gap(whole, theirs) <= BOUND["bf16"] and gap(resumed, whole) == 0
    for i, event in whole.train.items():
        assert event.updates.saturated is None, "an entry of a map has no bound to be near to"
        for name in ("mean", "max", "agreement"):
            found, wanted = (getattr(each.updates, name) for each in (event, theirs.train[i]))
            assert found == pytest.approx(wanted, rel=1e-2), (i, name)


@pytest.mark.distributed
def test_coming_over_from_adam(metrics: dict[str, Metrics], folder: Path) -> None:
    """S3 goes on where AdamW stopped, at its own rate and within its own bound."""
    adam, s3 = read_metrics(folder / "adam").train, read_metrics(folder / "from-adam").train
    assert (sorted(adam), sorted(s3)) == ([1, 2, 3, 4], [5, 6, 7, 8])
    assert s3[5].losses["lm_loss"] == pytest.approx(adam[4].losses["lm_loss"], rel=0.02), (
        "the same model on the next batch"
    )
    assert s3[5].lr == pytest.approx(10 * adam[4].lr, rel=0.1)
    assert all(0 < event.updates.max <= 1 for event in s3.values())
    for engine in ("zero1", "zero2"):
        check_fresh_from_adams_weights(metrics, folder, folder / f"weights-{engine}")


def check_fresh_from_adams_weights(metrics: dict[str, Metrics], folder: Path, watch: Path) -> None:
    """AdamW's weights and place in the data, and an S3 and a schedule at their beginning.

    The refusal of AdamW's state advised an argument of load_checkpoint, which no flag of the entry gave.
    """
    converted, fresh = read_metrics(folder / "from-adam").train, read_metrics(watch).train
    assert sorted(fresh) == [5, 6, 7, 8]
    # ZeRO 1 and 2 on as many ranks: the same weights on the same batch. On 4 ranks the means of the loss are summed in
    # another order.
    assert fresh[5].losses["lm_loss"] == pytest.approx(converted[5].losses["lm_loss"], rel=1e-6)
    first = metrics["zero2-fp32"].train[1]
    assert fresh[5].lr == first.lr
    assert fresh[5].updates.max == pytest.approx(first.updates.max, rel=1e-5), "a first step's"


@pytest.mark.distributed
def test_old_checkpoints_go_as_megatrons_do(metrics: dict[str, Metrics], folder: Path) -> None:
    """Saved at 20, 40 and 50, the end; of those, 40 is a multiple of the interval to retain, and 50 the last."""
    checkpoints = folder / "zero2-fp32/checkpoints"
    assert sorted(path.name for path in checkpoints.glob("iter*")) == ["iter_0000040", "iter_0000050"]
    assert (checkpoints / "latest").read_text() == "iter_0000050"
    assert not (folder / TORN).exists()


@pytest.mark.distributed
def test_on_4_ranks(metrics: dict[str, Metrics], folder: Path, tmp_path: Path) -> None:
    """Losses are Megatron's; and a run on 2 ranks goes on on 4, through a universal checkpoint, or as weights alone.

    DeepSpeed's converter failed on the empty _extra_state of Megatron's linear layers.
    """
    saved, run = folder / "zero2-fp32/checkpoints/iter_0000040", Run("zero2", "fp32")
    convert(saved, tmp_path / "universal/iter_0000040_universal")
    config = {**json.loads((CONFIGS / "zero2.json").read_text()), "checkpoint": {"load_universal": True}}
    (tmp_path / "zero2.json").write_text(json.dumps(config))
    _, argv = replace(run, resumed=True).job(tmp_path)
    argv = argv[: argv.index("--ckpt-step")]
    argv += ["--deepspeed-config", str(tmp_path / "zero2.json"), "--load", str(tmp_path / "universal")]
    short = [Run("megatron", "fp32", SHORT), Run("zero1", "fp32", SHORT)]
    four = launch(short, 4, tmp_path, ("deepspeed", argv), weights_of_adam(folder, watch=tmp_path))
    check_fresh_from_adams_weights(metrics, folder, tmp_path / "weights-zero2")
    assert gap(four["zero1-fp32"], four["megatron-fp32"]) <= BOUND["fp32"]
    resumed = read_metrics(tmp_path / "zero2-fp32-resumed")
    assert sorted(resumed.train) == list(range(41, STEPS + 1))
    # Dropout differs: each rank draws its own numbers, and there are other ranks. Without it, 1e-6 would do.
    assert gap(resumed, metrics[run.name]) <= 0.02


def convert(source: Path, target: Path) -> None:
    command = ["-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(source)]
    done = ranks([*command, "--output_folder", str(target)], nproc=1, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.distributed
def test_kill_and_resume_through_the_real_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank of a real torchrun dies; the same command goes on from the last checkpoint.

    It does again what the killed run had done since, and every loss must be the same, bit by bit. It trains with
    SoftSignum, which is soft from iteration 7 on: its schedule is in the checkpoint, and its update goes on falling.
    """
    small = ["model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=2", "model.seq_length=32"]
    short = ["schedule.train_iters=24", "schedule.lr_warmup_iters=2", "schedule.eval_interval=24"]
    others = ["engine=deepspeed", "model.vocab_size=256", "checkpoint.save_interval=8", "cluster.accelerator=cpu"]
    others += ["optimizer=softsignum", "optimizer.soft_start=0.25"]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    job = here(compose.load("gpt2_tiny", "local", [*small, *short, *others]))
    trial = Trial.of(job, tmp_path / "run", "SoftSignum", Forecast(print, starts=2, work=24))
    interruption = trial.train_through_a_kill(12, Console(quiet=True))
    assert 12 <= interruption.killed_at and interruption.resumed_from in (8, 16)
    seen: dict[int, list[tuple[float, float | None]]] = {}
    for event in Tail(tmp_path / "run/watch", from_start=True).events():
        if isinstance(event, Train):
            seen.setdefault(event.iteration, []).append((event.losses["lm_loss"], event.updates.mean))
    again = range(interruption.resumed_from + 1, interruption.killed_at + 1)
    assert sorted(seen) == list(range(1, 25)) and len(again) >= 1
    assert all(seen[i][0] == seen[i][1] for i in again)
    means = [seen[i][-1][1] for i in (6, interruption.resumed_from, 24)]
    assert means == sorted(means, reverse=True) and len({*means}) == 3, means
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir() if path.is_dir()] == ["iter_0000024"]
