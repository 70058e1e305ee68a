"""An observer belongs to a run: plain PyTorch, several optimizers, and what others' sinks do. On ranks:
tests/engines/megatron/watching.py."""

import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from s3_megatron.errors import S3Error
from s3_megatron.optim import S3, SoftSignum
from s3_megatron.watch import observer as watch_observer
from s3_megatron.watch.events import Event, Updates
from s3_megatron.watch.file import read_metrics
from s3_megatron.watch.observer import Observer
from s3_megatron.watch.part import Part
from s3_megatron.watch.sinks import TensorBoard, WandB

FIRST = (1 - 0.95**2) ** (2 / 3)  # |u| of S3's first step, of every coordinate with a gradient


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(8, 4)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    """One step on random gradients of many sizes; returns how far each weight moved, less what the decay took."""
    generator = torch.Generator().manual_seed(seed)
    before = [param.detach().clone() for param in model.parameters()]
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator) ** 3
    optimizer.step()
    decay = optimizer.param_groups[0]["lr"] * optimizer.param_groups[0]["weight_decay"]
    moved = [(a - b - decay * a).flatten() for a, b in zip(before, model.parameters(), strict=True)]
    return torch.cat(moved).detach()


def test_plain_pytorch_needs_three_lines(tmp_path: Path) -> None:
    """What docs/pytorch.md shows, with S3; the sizes are those that the weights moved by at a rate of 1, less the
    decay. Float32 weights and steps of about 1: roundings of a step are 2^-24, so 2^-20 of the sizes."""
    model = net(0)
    optimizer = S3(model.parameters(), lr=1.0, weight_decay=0.1)
    observer = Observer(tmp_path / "watch", optimizer)
    moved = []
    for iteration in (1, 2, 3):
        moved.append(step(model, optimizer, iteration).abs())
        observer.train(iteration, {"loss": torch.tensor(4.0 - iteration)})
    observer.evaluation("validation", 3, {"loss": 1.5})
    found = read_metrics(tmp_path / "watch")
    assert found.optimizer is not None
    assert (found.optimizer.name, found.optimizer.world_size, found.optimizer.shard_elements) == ("S3", 1, [36])
    assert found.optimizer.state_bytes_per_param_rank == 8 and found.optimizer.parameters == 36
    for iteration, sizes in enumerate(moved, start=1):
        event = found.train[iteration]
        assert event.losses == {"loss": 4.0 - iteration} and event.lr == 1.0 and event.optimizers == {}
        assert event.updates.mean == pytest.approx(sizes.mean().item(), rel=2**-20)
        assert event.updates.max == pytest.approx(sizes.max().item(), rel=2**-20)
        assert event.updates.saturated == (sizes > 0.9).double().mean()
    assert found.train[1].seconds is None and found.train[2].seconds is not None
    assert found.validation[3].losses == {"loss": 1.5}


def test_a_loss_with_its_graph_is_read_without_a_warning(tmp_path: Path) -> None:
    """The loop of docs/pytorch.md had torch's advice to detach it on the terminal."""
    model = net(0)
    optimizer = S3(model.parameters(), lr=1.0)
    observer = Observer(tmp_path / "watch", optimizer)
    step(model, optimizer, 1)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # this one comes once a process, which another test may have had
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            observer.train(1, {"loss": 2.5 + 0 * model.weight.sum()})
    finally:
        torch.set_warn_always(always)
    assert read_metrics(tmp_path / "watch").train[1].losses == {"loss": 2.5}


def test_agreement_is_of_weights_that_move_against_their_gradient(tmp_path: Path) -> None:
    """The flag's help had it the other way round. Three gradients of +1, then one of -1 for half of the weights: m is
    still positive there, so these weights go down, along their last gradient; the others go down, against it."""
    param = nn.Parameter(torch.zeros(10))
    optimizer = S3([param], lr=1.0, weight_decay=0.1)
    observer = Observer(tmp_path, optimizer)
    for iteration in (1, 2, 3, 4):
        param.grad = torch.ones(10)
        if iteration == 4:
            param.grad[:5] = -1e-3
        before = param.detach().clone()
        optimizer.step()
        observer.train(iteration, {})
    assert bool(((param.detach() - before) < 0).all()), "all go down"
    shares = [event.updates.agreement for event in read_metrics(tmp_path).train.values()]
    assert shares == [1.0, 1.0, 1.0, 0.5]


def test_what_is_no_single_pass_collects_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SoftSignum was none once, and was taken not to collect: its sizes were null. A hard step moves every weight by
    the rate, in float32: 2^-20 as above."""
    monkeypatch.setattr(SoftSignum, "single_pass", False)
    model = net(0)
    optimizer = SoftSignum(model.parameters(), lr=1.0, weight_decay=0.1, soft_start=1)
    observer = Observer(tmp_path / "watch", optimizer)
    moved = step(model, optimizer, 1).abs()
    observer.train(1, {"loss": 1.0})
    updates = read_metrics(tmp_path / "watch").train[1].updates
    assert updates.mean == pytest.approx(moved.mean().item(), rel=2**-20)
    assert updates.max == pytest.approx(1.0, rel=2**-20)


def test_two_optimizers_have_their_own_numbers(tmp_path: Path) -> None:
    """A GAN: the second one that was made took the place of the first. Each line has both, and what they are
    together."""
    models = [net(0), net(1)]
    optimizers = S3(models[0].parameters(), lr=1.0, weight_decay=0.1), S3(models[1].parameters(), lr=1.0, p=1.0)
    observer = Observer(tmp_path, generator=optimizers[0], discriminator=optimizers[1])
    for iteration in (1, 2):
        moved = [step(*pair, 7 * iteration + i) for i, pair in enumerate(zip(models, optimizers, strict=True))]
        observer.train(iteration, {"g_loss": 1.0, "d_loss": 2.0})
    event = read_metrics(tmp_path).train[2]
    for name, sizes in zip(("generator", "discriminator"), moved, strict=True):
        assert event.optimizers[name].mean == pytest.approx(sizes.abs().mean().item(), rel=2**-20)
        assert event.optimizers[name].max == pytest.approx(sizes.abs().max().item(), rel=2**-20)
    assert event.optimizers["generator"] != event.optimizers["discriminator"]
    assert event.updates.mean == pytest.approx(torch.cat(moved).abs().mean().item(), rel=2**-20)
    assert event.updates.max == pytest.approx(torch.cat(moved).abs().max().item(), rel=2**-20)


def test_two_observers_share_nothing(tmp_path: Path) -> None:
    """Two models in one process, each a run with a folder of its own."""
    runs = []
    for seed in (0, 1):
        model = net(seed)
        optimizer = S3(model.parameters(), lr=1.0 + seed, weight_decay=0.1)
        runs.append((model, optimizer, Observer(tmp_path / str(seed), optimizer)))
    moved = {}
    for iteration in (1, 2):
        for seed, (model, optimizer, observer) in enumerate(runs):
            moved[seed] = step(model, optimizer, seed + iteration).abs() / (1 + seed)
            observer.train(iteration, {"loss": seed})
    for seed in (0, 1):
        event = read_metrics(tmp_path / str(seed)).train[2]
        assert (event.losses["loss"], event.lr) == (seed, 1.0 + seed)
        assert event.updates.mean == pytest.approx(moved[seed].mean().item(), rel=2**-20)


def test_s3_beside_adam_is_counted_and_the_shares_are_s3s_alone(tmp_path: Path) -> None:
    models = [net(0), net(1)]
    optimizers = S3(models[0].parameters(), lr=1.0), torch.optim.AdamW(models[1].parameters(), lr=1.0)
    observer = Observer(tmp_path, s3=optimizers[0], adam=optimizers[1])
    for pair in zip(models, optimizers, strict=True):
        step(*pair, 3)
    observer.train(1, {})
    event = read_metrics(tmp_path).train[1]
    # Adam's first update is the sign, but for eps.
    assert event.optimizers["adam"].mean == pytest.approx(1, abs=1e-3)
    assert event.optimizers["s3"].mean == pytest.approx(FIRST, rel=1e-5)
    assert event.updates.mean == pytest.approx((1 + FIRST) / 2, abs=1e-3)
    assert event.optimizers["s3"].agreement == 1 and event.optimizers["adam"].agreement is None
    assert event.updates.agreement is None, "a share of both is not known"


def test_what_is_not_known_is_null_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SGD's updates were given as 0."""
    model = net(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = Observer(tmp_path, optimizer)
    for iteration in (1, 2):
        step(model, optimizer, iteration)
        observer.train(iteration, {}, grad_norm=torch.tensor(2.0))
    assert read_metrics(tmp_path).train[2].updates == Updates()
    assert read_metrics(tmp_path).train[2].grad_norm == 2.0
    (record,) = caplog.records
    assert "no update size of optimizer 1 (SGD) is known so far: S3's are watched" in record.getMessage()


def test_a_skipped_step_has_no_sizes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = net(0)
    optimizer = S3(model.parameters(), lr=0.1)
    observer = Observer(tmp_path, optimizer)
    step(model, optimizer, 1)
    observer.train(1, {}, skipped=True)
    event = read_metrics(tmp_path).train[1]
    assert event.skipped and event.updates == Updates() and not caplog.records


def test_an_optimizer_is_described_when_it_has_a_state(tmp_path: Path) -> None:
    """In fp16 the first steps overflow and are skipped, and AdamW has no state yet: 0 bytes a parameter were written
    down for the whole run."""
    model = net(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    observer = Observer(tmp_path, optimizer)
    for iteration in (1, 2):
        observer.train(iteration, {"loss": 3.0}, skipped=True)
    step(model, optimizer, 3)
    observer.train(3, {"loss": 2.0})
    found = read_metrics(tmp_path)
    assert found.optimizer is not None and found.optimizer.state_bytes_per_param_rank == 8
    assert [event.skipped for event in found.train.values()] == [True, True, False]
    assert found.train[3].updates.mean == pytest.approx(1.0, rel=1e-3), "a first step of Adam is a sign"


def test_optimizers_that_are_gone_are_neither_kept_nor_counted(tmp_path: Path) -> None:
    """The first optimizer's state, two thirds of a training's memory, stayed on the device for as long as the run."""
    model = net(0)
    optimizer = S3(model.parameters(), lr=1.0)
    observer = Observer(tmp_path, optimizer)
    step(model, optimizer, 1)
    observer.train(1, {})
    gone = weakref.ref(optimizer)
    optimizer = S3(model.parameters(), lr=1.0)
    gc.collect()
    assert gone() is None
    observer.add([Part(optimizer)])
    moved = step(model, optimizer, 2).abs()
    observer.train(2, {})
    event = read_metrics(tmp_path).train[2]
    assert event.optimizers == {} and event.updates.mean == pytest.approx(moved.mean().item(), rel=2**-20)


def test_the_time_of_an_iteration_is_never_negative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart inside the process does iterations again, which was a division by zero; the wall clock, which may be
    set back, is not read."""
    now = iter([10.0, 12.0, 13.0, 14.0, 20.0])
    monkeypatch.setattr(watch_observer.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(watch_observer.time, "time", lambda: pytest.fail("the wall clock was read"))
    seen = []

    class Sink:
        def write(self, event: Event) -> None:
            seen.append(getattr(event, "seconds", "description"))

    observer = Observer(tmp_path, sinks=[Sink()])
    for iteration in (1, 2, 2, 1, 4):
        observer.train(iteration, {})
    assert seen == ["description", None, 2.0, None, None, 2.0]


def test_a_loss_cannot_take_the_name_of_a_field(tmp_path: Path) -> None:
    """It would be written over, or be taken for the field by whoever reads the line."""
    with pytest.raises(S3Error, match="a loss has the name lr, which a line of metrics has for something else"):
        Observer(tmp_path).train(1, {"lr": 1.0})


def test_a_model_on_two_devices_is_named_and_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """S3 adds up on one device; it refused to step. "meta" stands for a second device, which is not here."""
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))]
    optimizer = S3(params, lr=1.0)
    Observer(tmp_path, optimizer)
    assert optimizer.update_statistics is None and "are not watched" in caplog.text


def test_tensorboard_has_the_sizes_of_each(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    models = [net(0), net(1)]
    optimizers = [S3(model.parameters(), lr=1.0) for model in models]
    board = SummaryWriter(str(tmp_path / "board"))
    observer = Observer(tmp_path, sinks=[TensorBoard(board)], a=optimizers[0], b=optimizers[1])
    for pair in zip(models, optimizers, strict=True):
        step(*pair, 1)
    observer.train(5, {"loss": 1.0})
    board.close()
    read = EventAccumulator(str(tmp_path / "board")).Reload()
    sizes = [f"update_{name}" for name in ("mean", "max", "saturated", "agreement")]
    assert sorted(read.Tags()["scalars"]) == sorted([*sizes, *(f"{size}/{name}" for size in sizes for name in "ab")])
    (mean,) = read.Scalars("update_mean/b")
    assert mean.step == 5 and mean.value == pytest.approx(FIRST, rel=1e-5)


def test_wandb_offline_takes_the_sizes_and_its_end_is_not_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A node without a way out has W&B offline. After wandb.finish() it raises in every log(), which ended training;
    an iteration that a resumed run does again is a step back, which W&B drops."""
    wandb: Any = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    model = net(0)
    optimizer = S3(model.parameters(), lr=1.0)
    run = wandb.init(project="s3", dir=str(tmp_path))
    observer = Observer(tmp_path, optimizer, sinks=[WandB(run)])
    for iteration in (1, 2, 1):
        step(model, optimizer, iteration)
        observer.train(iteration, {})
    assert run.summary["update_mean"] > 0
    run.finish()
    for iteration in (3, 4):
        step(model, optimizer, iteration)
        observer.train(iteration, {})
    assert sorted(read_metrics(tmp_path).train) == [1, 2, 3, 4]
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("s3_megatron")]
    assert len(ours) == 1 and ours[0].startswith("WandB does not take what is watched: ")
