"""S3 in real pretraining runs of a tiny GPT: layouts, overlap, resuming on other ranks."""

import functools
from pathlib import Path

import pytest

from s3_megatron.watch.file import read_metrics
from tests.engines.megatron.gpt import HAS_ENTRY, flags
from tests.trainings import Job, train_all

pytestmark = pytest.mark.distributed

SAVED_AT, LAST = 4, 8

LAYOUTS = {
    "dp2": (2, 1, 1, ()),
    "dp2-overlap": (2, 1, 1, ("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "8000")),
    "dp1": (1, 1, 1, ()),
    "dp4": (4, 1, 1, ()),
    "tp2-dp2": (4, 2, 1, ()),
    "pp2-dp2": (4, 1, 2, ()),
}
# In bf16 only where a layout changes what is summed.
CASES = [(None, layout) for layout in LAYOUTS] + [("bf16", "tp2-dp2"), ("bf16", "pp2-dp2")]
# The same layout is bit-equal. Another one sums in another order, and S3, like every optimizer that divides a gradient
# by its size, turns a rounding difference of a gradient near zero into a step; over these 4 iterations the losses were
# seen to differ by 9e-8 in fp32 and 1.1e-5 in bf16; ten times that is allowed.
TOLERANCE = {None: 1e-6, "bf16": 1e-4}


def base(precision: str | None, folder: Path) -> Job:
    """An uninterrupted run on 2 data-parallel ranks, which leaves a checkpoint at iteration 4."""
    name = precision or "fp32"
    command = flags(iterations=LAST, precision=precision, checkpoints=folder / f"{name}-saved", save_every=SAVED_AT)
    return "megatron", [*command, "--watch-dir", str(folder / name)]


def resumed(precision: str | None, layout: str, folder: Path) -> Job:
    """The same run from iteration 4 on, in another layout."""
    _, tensor_parallel, pipeline_parallel, extra = LAYOUTS[layout]
    name = precision or "fp32"
    load = ("--load", str(folder / f"{name}-saved"), "--ckpt-step", str(SAVED_AT), "--ckpt-format", "torch_dist")
    command = flags(
        iterations=LAST,
        precision=precision,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        extra=(*extra, *load, "--dist-ckpt-optim-fully-reshardable"),
    )
    return "megatron", [*command, "--watch-dir", str(folder / f"{name}-{layout}")]


# Two stages, of which each rank has the first and third, or the second and fourth layer.
VIRTUAL = ("--num-virtual-stages-per-pipeline-rank", "2", "--overlap-grad-reduce", "--overlap-param-gather")
SOFT_LAYOUTS = {**LAYOUTS, "vpp2-dp2": (4, 1, 2, VIRTUAL)}
# Hard for 4 iterations. From 4 on, m is measured in the new layout; from 6 on, the schedule is there.
SOFT = [("softsignum", layout, start) for start in (4, 6) for layout in SOFT_LAYOUTS]
SOFT += [("softmuon", layout, 4) for layout in ("dp2-overlap", "vpp2-dp2")]
SOFT = SOFT if HAS_ENTRY else []


def soft(folder: Path, optimizer: str, layout: str = "dp2", start: int = 0) -> Job:
    """SoftSignum, or SoftMuon in bf16, uninterrupted on 2 data-parallel ranks, or from ``start`` on in ``layout``."""
    _, tensor_parallel, pipeline_parallel, extra = SOFT_LAYOUTS[layout]
    saved = folder / f"{optimizer}-saved"
    if start:
        extra += ("--load", str(saved), "--ckpt-step", str(start), "--ckpt-format", "torch_dist")
    extra += ("--num-layers", "4", f"--{optimizer}-soft-start", "0.5", "--dist-ckpt-optim-fully-reshardable")
    command = flags(
        iterations=LAST,
        optimizer=optimizer,
        precision="bf16" if optimizer == "softmuon" else None,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        checkpoints=None if start else saved,
        save_every=2,
        extra=extra,
    )
    return "megatron", [*command, "--watch-dir", str(folder / f"{optimizer}-{layout}-{start}")]


# Experts on 2 ranks in pairs; from 4 on under other expert parallelism, with one optimizer or two.
EXPERTS = {"ep2": (2, 2, 1), "ep1": (2, 1, 1), "ep4": (4, 4, 1), "pp2-ep2": (4, 2, 2)}
MOVED = [("softsignum", layout, start) for start in (4, 6) for layout in EXPERTS] if HAS_ENTRY else []
MOVED += (
    [("softmuon", "ep2", 6), ("softmuon", "ep1", 6), ("softmuon", "ep4", 4), ("softmuon", "pp2-ep2", 6)]
    if HAS_ENTRY
    else []
)


def experts(folder: Path, optimizer: str, layout: str = "ep2", start: int = 0) -> Job:
    """GPT with four experts a layer, uninterrupted on 2 ranks, or from iteration ``start`` on."""
    _, expert_parallel, pipeline_parallel = EXPERTS[layout]
    saved = folder / f"{optimizer}-experts-saved"
    extra = ("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "24", "--disable-bias-linear")
    extra += ("--expert-model-parallel-size", str(expert_parallel), f"--{optimizer}-soft-start", "0.5")
    if start:
        extra += ("--load", str(saved), "--ckpt-step", str(start), "--ckpt-format", "torch_dist")
    command = flags(
        iterations=LAST,
        optimizer=optimizer,
        precision="bf16" if optimizer == "softmuon" else None,
        pipeline_parallel=pipeline_parallel,
        checkpoints=None if start else saved,
        save_every=2,
        extra=(*extra, "--dist-ckpt-optim-fully-reshardable"),
    )
    return "megatron", [*command, "--watch-dir", str(folder / f"{optimizer}-experts-{layout}-{start}")]


def frozen(name: str, folder: Path, *load: str) -> Job:
    """A run on two pipeline stages, of which the first holds nothing but frozen weights; fp32, saved in the default."""
    command = flags(iterations=LAST, pipeline_parallel=2, extra=("--untie-embeddings-and-output-weights", *load))
    return "frozen", [*command, "--ckpt-format", "torch_dist", "--watch-dir", str(folder / name)]


def in_parts(folder: Path) -> list[Job]:
    """What else goes on: a frozen stage, and weights alone with the flag that we advise."""
    stage, weights = str(folder / "frozen-saved"), folder / "weights-saved"
    save, load = ("--save-interval", str(SAVED_AT)), ("--ckpt-step", str(SAVED_AT), "--ckpt-format", "torch_dist")
    alone = flags(iterations=SAVED_AT, checkpoints=weights, save_every=SAVED_AT, extra=("--no-save-optim",))
    fresh = flags(iterations=LAST, extra=("--load", str(weights), *load, "--no-load-optim"))
    return [
        frozen("frozen", folder, "--save", stage, *save),
        frozen("frozen-resumed", folder, "--load", stage, *load[:2]),
        ("megatron", [*alone, "--watch-dir", str(folder / "weights")]),
        ("megatron", [*fresh, "--watch-dir", str(folder / "weights-fresh")]),
    ]


def adams(folder: Path) -> list[Job]:
    """Two iterations of Adam, under DistributedOptimizer and under Megatron-FSDP (0.19), which must not scale gradients
    while it reduces them: gloo cannot."""
    fsdp = (
        *("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params"),
        *("--no-gradient-reduce-div-fusion", "--ckpt-format", "fsdp_dtensor"),
    )
    sharded = {"adam": (), **({"adam-fsdp": fsdp} if HAS_ENTRY else {})}
    command = functools.partial(flags, iterations=2, optimizer="adam")
    return [("megatron", [*command(extra=extra), "--watch-dir", str(folder / name)]) for name, extra in sharded.items()]


def train(folder: Path, first: list[Job], later: list[tuple[int, Job]]) -> Path:
    """Train ``first`` on 2 ranks, then each job of ``later`` on as many as stand before it: a launch for each number.

    Returns FOLDER, where every run has left its metrics.
    """
    runs = [*((2, job) for job in first), *later]
    for ranks in (2, 1, 4):
        if jobs := [job for number, job in runs if number == ranks]:
            train_all(jobs, ranks, folder)
    return folder


# A fixture for each kind of runs: a test trains its own kind alone.
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    first = [*(base(precision, folder) for precision in TOLERANCE), *in_parts(folder), *adams(folder)]
    return train(folder, first, [(LAYOUTS[case[1]][0], resumed(*case, folder)) for case in CASES])


@pytest.fixture(scope="module")
def softened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("softened")
    first = [soft(folder, optimizer) for optimizer in ("softsignum", "softmuon")]
    return train(folder, first, [(SOFT_LAYOUTS[case[1]][0], soft(folder, *case)) for case in SOFT])


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moved")
    first = [experts(folder, optimizer) for optimizer in ("softsignum", "softmuon")]
    return train(folder, first, [(EXPERTS[case[1]][0], experts(folder, *case)) for case in MOVED])


def losses(folder: Path, name: str) -> dict[int, float]:
    """The loss of every iteration, unrounded."""
    return {iteration: event.losses["lm_loss"] for iteration, event in read_metrics(folder / name).train.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_update_sizes_are_what_a_first_step_cannot_but_have(folder: Path, precision: str) -> None:
    """Of a first step every coordinate with a gradient has |u| = (1 - beta^2)^(2/3), 0.21, against its gradient, so the
    mean is their share. None is beyond 0.9, then or in the second step, where |u| is at most 0.34."""
    events = list(read_metrics(folder / precision).train.values())
    first = events[0]
    assert first.updates.max == pytest.approx((1 - 0.95**2) ** (2 / 3), rel=1e-5)
    assert first.updates.agreement == pytest.approx(first.updates.mean / first.updates.max, rel=1e-5)
    assert first.updates.saturated == events[1].updates.saturated == 0
    assert all(0.5 < event.updates.agreement < 1 for event in events[1:]), "batches differ, averages follow them"


@pytest.mark.parametrize(("precision", "layout"), CASES, ids=lambda value: value or "fp32")
def test_every_layout_goes_on_with_the_same_losses(folder: Path, precision: str | None, layout: str) -> None:
    """TP=2 x DP=2 and PP=2 x DP=2 start from TP=1's own weights: PP seeds its stages apart, so only a checkpoint can
    give both the same model; and resuming on another number of ranks is what users do with it."""
    name = precision or "fp32"
    uninterrupted, seen = losses(folder, name), losses(folder, f"{name}-{layout}")
    assert sorted(uninterrupted) == list(range(1, LAST + 1))
    assert sorted(seen) == list(range(SAVED_AT + 1, LAST + 1)), "resumed from the checkpoint"
    worst = max(abs(loss / uninterrupted[iteration] - 1) for iteration, loss in seen.items())
    print(f"{layout} {precision}: losses differ by {worst:.1e} at most")
    assert worst <= (0.0 if layout == "dp2" else TOLERANCE[precision])


@pytest.mark.parametrize(("optimizer", "layout", "start"), SOFT)
def test_a_soft_run_goes_on_in_every_layout(softened: Path, optimizer: str, layout: str, start: int) -> None:
    """SoftSignum's hard steps move every weight by the whole rate, soft ones by less. Another temperature would show in
    the sizes, which are compared where no weight is on several ranks: the watch counts it as often. SoftMuon's bucket
    by bucket gathering ended in a RuntimeError of gloo's, with --overlap-param-gather."""
    whole, seen = (read_metrics(softened / f"{optimizer}-{name}").train for name in ("dp2-0", f"{layout}-{start}"))
    assert (sorted(whole), sorted(seen)) == ([*range(1, LAST + 1)], [*range(start + 1, LAST + 1)])
    assert optimizer == "softmuon" or all(whole[i].updates.max == 1 for i in range(1, 5))
    assert whole[LAST].updates.mean < whole[4].updates.mean
    gap = max(abs(event.losses["lm_loss"] / whole[i].losses["lm_loss"] - 1) for i, event in seen.items())
    sizes = max(abs(event.updates.mean / whole[i].updates.mean - 1) for i, event in seen.items())
    print(f"{optimizer}, {layout} from {start}: losses differ by {gap:.1e} at most, mean updates by {sizes:.1e}")
    assert gap <= (0.0 if layout == "dp2" else TOLERANCE["bf16" if optimizer == "softmuon" else None])
    assert sizes <= (0.0 if layout == "dp2" else 1e-7) or layout in ("tp2-dp2", "pp2-dp2", "vpp2-dp2")


@pytest.mark.skipif(not HAS_ENTRY, reason="the distributed optimizer takes one state tensor with megatron-core 0.19")
def test_softsignum_has_one_state_tensor_in_shards(softened: Path) -> None:
    """4 bytes of each of a rank's elements, of which two ranks have half each, but for what does not divide evenly."""
    event = read_metrics(softened / "softsignum-dp2-0").optimizer
    assert event is not None and sum(event.shard_elements) == event.parameters
    assert event.state_bytes_per_param_rank == 4 * max(event.shard_elements) / event.parameters < 2.1


@pytest.mark.parametrize(("optimizer", "layout", "start"), MOVED)
def test_experts_go_on_under_another_expert_parallelism(moved: Path, optimizer: str, layout: str, start: int) -> None:
    """From 4 on m is measured there: a weight that counted once a rank would make another temperature, and other
    update sizes, compared where no weight is on several stages. SoftMuon's are in bf16, with S3's beside them: seen to
    differ by 1.4e-4, and losses by 3.8e-6."""
    whole, seen = (read_metrics(moved / f"{optimizer}-experts-{name}").train for name in ("ep2-0", f"{layout}-{start}"))
    assert (sorted(whole), sorted(seen)) == ([*range(1, LAST + 1)], [*range(start + 1, LAST + 1)])
    assert optimizer == "softmuon" or whole[LAST].updates.mean < whole[4].updates.mean
    gap = max(abs(event.losses["lm_loss"] / whole[i].losses["lm_loss"] - 1) for i, event in seen.items())
    sizes = max(abs(event.updates.mean / whole[i].updates.mean - 1) for i, event in seen.items())
    print(f"{optimizer}, {layout} from {start}: losses differ by {gap:.1e} at most, mean updates by {sizes:.1e}")
    precision, near = ("bf16", 1e-3) if optimizer == "softmuon" else (None, 1e-7)
    assert gap <= (0.0 if layout == "ep2" else TOLERANCE[precision])
    assert sizes <= (0.0 if layout == "ep2" else near) or layout == "pp2-ep2"


@pytest.mark.skipif(not HAS_ENTRY, reason="the rehearsal runs Megatron-FSDP with megatron-core 0.19")
def test_adam_under_megatrons_fsdp_is_watched(folder: Path) -> None:
    """Its states are DTensors, uneven over the ranks: the run ended in an error at its first line. Sizes are those of
    the same Adam under DistributedOptimizer; the two reduce in different orders, and a first update is g / (|g| + eps):
    1e-3 of them."""
    plain, fsdp = (read_metrics(folder / name) for name in ("adam", "adam-fsdp"))
    assert fsdp.optimizer is not None and plain.optimizer is not None
    assert sum(fsdp.optimizer.shard_elements) == sum(plain.optimizer.shard_elements) == plain.optimizer.parameters
    for iteration in (1, 2):
        one, other = plain.train[iteration], fsdp.train[iteration]
        assert other.losses["lm_loss"] == pytest.approx(one.losses["lm_loss"], rel=1e-5)
        assert other.updates.mean == pytest.approx(one.updates.mean, rel=1e-3)
        assert other.updates.max == pytest.approx(one.updates.max, rel=1e-3)


def test_a_frozen_pipeline_stage_is_saved_and_goes_on(folder: Path) -> None:
    """Its optimizer holds nothing; the first save was an AssertionError without a text, of Adam too."""
    uninterrupted, seen = losses(folder, "frozen"), losses(folder, "frozen-resumed")
    assert uninterrupted[LAST] < uninterrupted[1], "the output layer learns"
    assert seen == {iteration: uninterrupted[iteration] for iteration in range(SAVED_AT + 1, LAST + 1)}


def test_weights_alone_go_on_with_fresh_state_as_the_refusal_advises(folder: Path) -> None:
    """After --no-save-optim a resume is refused, with --no-load-optim as the way on: these weights, the schedule from
    its beginning, and the update of a first step."""
    full, fresh = losses(folder, "fp32"), losses(folder, "weights-fresh")
    assert fresh[SAVED_AT + 1] == full[SAVED_AT + 1], "the weights are the checkpoint's"
    first = read_metrics(folder / "weights-fresh").train[SAVED_AT + 1]
    assert first.updates.max == pytest.approx((1 - 0.95**2) ** (2 / 3), rel=1e-5)
