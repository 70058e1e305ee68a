"""Runs on ranks, from worker.py: SoftMuon under DeepSpeed's ZeRO 1 and 2 with S3 beside it, in both phases."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s3_megatron.engines.deepspeed import activity
from s3_megatron.engines.deepspeed.softmuon import ZeroMatrices
from s3_megatron.optim import S3, SoftMuon
from tests.engines.deepspeed import harness as on
from tests.engines.deepspeed.checkpoints import convert, load, save
from tests.engines.deepspeed.window import OLD
from tests.rank_checks import refuses, shared_folder

STEPS, HARD = 8, 4
PHASES = {"total_steps": STEPS, "soft_start": 0.5}
# Two head groups of a fused weight: the rows of Q, K and V.
QKV = [4, 2, 2]
PARAMS = {**PHASES, "split_qkv": {"fu?ed": QKV}}
MATRICES = ("linear", "square", "wide", "tall", "fused")
# The longest step: 0.2 * sqrt(27) times the rate; the map has the same input as the unsharded one.
LONGEST = on.LR * 0.2 * 27**0.5


class Net(on.Net):
    """Matrices of sizes that no partition's border leaves whole; the embedding is none of SoftMuon's."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        for name, shape in (("square", (8, 8)), ("wide", (5, 21)), ("tall", (20, 3)), ("fused", (16, 8))):
            value = torch.randn(shape, generator=generator).bfloat16().float()
            self.register_parameter(name, nn.Parameter(value))


def blocks(fused: Tensor) -> list[Tensor]:
    """The Q of both head groups, as one matrix, the K and the V."""
    first, second = fused.detach().chunk(2)
    return [torch.cat(rows) for rows in zip(first.split(QKV), second.split(QKV), strict=True)]


class Reference:
    """SoftMuon and S3 side by side on float32 copies; Q, K and V of the fused weight are matrices of their own."""

    def __init__(self, **settings: Any) -> None:
        self.net = Net()
        named = dict(self.net.named_parameters())
        self.blocks = [nn.Parameter(block) for block in blocks(named["fused"])]
        matrices = [named[name] for name in named if name in MATRICES and name != "fused"] + self.blocks
        settings = {**PHASES, "process_group": alone(), **settings}
        rest = [{"params": [named["embedding"]]}, {"params": [named["bias"]], "weight_decay": 0.0}]
        rest.append({"params": [named["scale"]], "weight_decay": 0.5 if on.ALONE else 0.0})
        self.optimizers = [
            SoftMuon(matrices, on.LR, weight_decay=on.DECAY, **settings),
            S3(rest, on.LR, weight_decay=on.DECAY),
        ]

    def step(self, grads: dict[str, Tensor], clip: float = 0.0) -> None:
        for name, param in self.net.named_parameters():
            param.grad = grads[name].clone() if param.requires_grad else None
        if clip:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), clip)
        for block, grad in zip(self.blocks, blocks(self.net.fused.grad), strict=True):
            block.grad = grad
        for optimizer in self.optimizers:
            optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        found = {name: param.detach() for name, param in self.net.named_parameters() if param.requires_grad}
        halves = zip(*(block.detach().chunk(2) for block in self.blocks), strict=True)
        return {**found, "fused": torch.cat([part for half in halves for part in half])}


_alone: list[Any] = []


def alone() -> Any:
    """A group of this rank alone."""
    if not _alone:
        _alone.extend([[dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]])
    return _alone[0]


def started(
    stage: int = 1, precision: str = "fp32", params: dict[str, Any] = PARAMS, is_marked: bool = False, **settings: Any
) -> on.Run:
    net = Net()
    for name, param in net.named_parameters() if is_marked else []:  # as by DeepSpeed's Muon
        param.use_muon = name in MATRICES
    return on.Run(stage, precision, optimizer="SoftMuon", params=params, **{"net": net, **settings})


def grads_of(step: int) -> dict[str, Tensor]:
    return {name: grad * 1e-2 for name, grad in on.gradients(step, Net()).items()}


def numbers(run: on.Run) -> tuple[Any, ...]:
    inner = run.engine.basic_optimizer
    return inner.schedule, inner.tau, *(group["steps_taken"] for group in inner.param_groups)


def everything(run: on.Run) -> list[Tensor]:
    optimizer = run.engine.basic_optimizer
    held = on.masters(run.wrapper)
    state = [x for master in held for x in optimizer.state[master].values() if torch.is_tensor(x)]
    return [t.detach().clone() for t in (*held, *state)]


def compare(run: on.Run, reference: Reference) -> None:
    for name, weight in run.weights().items():
        atol = 1e-6 * (LONGEST if name in MATRICES else on.LR)
        on.close({name: weight}, reference.weights(), rtol=1e-6, atol=atol)
        moved = (reference.weights()[name] - dict(Net().named_parameters())[name]).abs().max()
        assert moved > 100 * atol, name
    ours, theirs = numbers(run)[0], reference.optimizers[0].schedule
    assert (ours.first, ours.length) == (theirs.first, theirs.length) == (HARD, STEPS - HARD)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert abs(a - b) <= 1e-6 * abs(b), (a, b)


def check_softmuon_trains_and_resumes() -> None:
    """As the unsharded run, with weight decay and Q, K and V apart; saved in either phase, it goes on to the bit.

    The partitions' borders cut matrices, of which each holder maps the whole: m has the same bits there, and so weights
    agree to 1e-6, 8 ULP, of the value or of the longest step.
    """
    for stage in (1, 2):
        run, resumed, reference = started(stage), [], Reference()
        optimizer = run.engine.basic_optimizer
        assert type(optimizer) is ZeroMatrices
        cuts = [piece.is_cut for pieces in optimizer.pieces.values() for piece in pieces]
        assert len(cuts) == len(MATRICES) and (any(cuts) or dist.get_world_size() == 1)
        for step in range(STEPS):
            if step in (2, HARD + 1, HARD + 2):
                save(run, folder := shared_folder())
                resumed.append(started(stage))
                load(resumed[-1], folder)
            assert all(each.step(grads_of(step)) for each in (run, *resumed))
            reference.step(grads_of(step))
        compare(run, reference)
        assert activity(run.engine).steps == STEPS
        for other in resumed:
            on.equal(everything(other), everything(run))
            assert numbers(other) == numbers(run)


def check_universal_checkpoints_of_softmuon(folder: Path) -> None:
    """From 2 ranks to 2, 1 and 4, of either phase: weights as the unsharded run's, and its temperature."""
    for saved_at in (2, HARD + 2):
        place = folder / f"softmuon-{saved_at}"
        if dist.get_world_size() == 2:
            run = started()
            for step in range(saved_at):
                run.step(grads_of(step))
            save(run, place)
            if dist.get_rank() == 0:
                convert(place)
            dist.barrier()
        run, reference = started(checkpoint={"load_universal": True}), Reference()
        load(run, place / "universal")
        for step in range(STEPS):
            reference.step(grads_of(step))
            if step >= saved_at:
                assert run.step(grads_of(step))
        compare(run, reference)


def check_softmuon_clips_gradients_and_no_updates() -> None:
    """DeepSpeed's Muon clips what it has mapped: an update of norm 0.5 where one of 0.2 * sqrt(27) * sqrt(13) was
    meant. Under offload, accumulation and bfloat16, too; and where weights have its marks, by which ZeRO took any class
    with "muon" in its name for its own (KeyError: 'momentum')."""
    bf16 = [{"stage": 2, "precision": "bf16"}]
    bf16 += [] if OLD else [{"precision": "bf16", **on.FLOAT32_ACCUMULATION}]  # BF16_Optimizer
    marked = [{"stage": 2, "is_marked": True}, {"offload": True, "is_marked": True}]
    for settings in ({}, {"offload": True}, {"accumulate": 2}, *marked, *bf16):
        run, reference = started(clip=0.5, **settings), Reference()
        for step in range(STEPS):
            assert run.step(grads_of(step))
            reference.step(grads_of(step), clip=0.5)
        is_bf16 = settings.get("precision") == "bf16"
        for name, weight in run.weights().items():
            # Gradients come in bfloat16, 2^-9 each, of which a map makes another step where singular values are close.
            error = 5e-2 if is_bf16 else 1e-5
            on.close({name: weight}, reference.weights(), rtol=error, atol=error * LONGEST * (STEPS if is_bf16 else 1))


def check_softmuon_skips_an_overflow_and_its_schedule_does_not_advance() -> None:
    """At the step that would begin the soft phase, and in it."""
    small = {name: grad.clamp(-1, 1) for name, grad in on.gradients(2, Net()).items()}
    huge = {name: grad * 1e5 for name, grad in small.items()}
    with on.float16_allowed():
        run = started(precision="fp16", fp16={"initial_scale_power": 4, "hysteresis": 1})
        for step in range(STEPS):
            if step in (HARD, HARD + 1):
                before, found = everything(run), numbers(run)
                assert not run.step(huge)
                on.equal(everything(run), before)
                assert numbers(run) == found
            assert run.step(small)
    assert {*numbers(run)[2:]} == {STEPS} and numbers(run)[0].first == HARD


def check_a_nan_leaves_softmuons_weights() -> None:
    """In one entry, on one rank: ZeRO skips the step in every precision it looks in; where not, the matrix stays."""
    run = started(precision="bf16", bf16={"check_grad_overflow": False})
    run.step(grads_of(0))
    before = run.weights()
    bad = grads_of(1)
    if dist.get_rank() == 0:
        bad["wide"][0, 0] = float("nan")
    run.step(bad)
    after = run.weights()
    assert torch.equal(after["wide"], before["wide"]) and not torch.equal(after["tall"], before["tall"])
    assert all(weight.isfinite().all() for weight in after.values())


def check_other_settings_of_softmuon_are_refused_at_a_resume() -> None:
    """The checkpoint's counted, in silence; and of a split that no group had, this run's."""
    run = started()
    run.step(grads_of(0))
    save(run, folder := shared_folder())
    for changed in (
        {"scale_mode": "unit_rms_norm"},
        {"extra_scale_factor": 1.0},
        {"coefficient_type": "simple"},
        {"num_ns_steps": 7},
        {"fp32_matmul_prec": "highest"},
        {"split_qkv": {}},
    ):
        (name, value), *_ = changed.items()
        advice = f"{name}={value}", '"softmuon_override_hyperparameters": true'
        refuses(lambda c=changed: load(started(params={**PARAMS, **c}), folder), *advice)
        other = started(params={**PARAMS, **changed, "softmuon_override_hyperparameters": True})
        load(other, folder)
        assert all(group[name] == value for group in other.engine.basic_optimizer.param_groups[:1])
        assert other.step(grads_of(1))
    load(same := started(), folder)
    assert same.engine.basic_optimizer.param_groups[0]["split_qkv"] == {"fu?ed": QKV}


def check_what_softmuon_cannot_do_is_refused() -> None:
    for split, advice in (
        (True, "split_qkv is True: it must have the rows"),
        ({"fused": 8}, "it must have the rows"),
        ({"fused": [4, 0, 4]}, "it must have the rows"),
        ({"c_attn*": QKV}, "'c_attn*', and no parameter of the model is called so"),
        ({"embedding": QKV}, "embedding of shape [101, 13] is no matrix of SoftMuon's"),
        ({"fused": [3, 3, 3]}, "fused has 16 rows: they must be a multiple of 9"),
        ({"fused": QKV, "fu*": [2, 1, 1]}, "fused must fit one entry"),
    ):
        refuses(lambda s=split: started(params={**PHASES, "split_qkv": s}), advice)
    net = Net()
    net.empty = nn.Parameter(torch.zeros(0, 3))
    refuses(lambda: started(net=net), "[0, 3], no element")
    net = Net()
    net.fused.requires_grad_(False)  # that it is named in split_qkv is no mistake
    started(net=net).step(grads_of(0))
    assert torch.equal(net.fused, Net().fused)
    frozen = Net()
    for name in MATRICES:
        frozen.get_parameter(name).requires_grad_(False)
    refuses(lambda: started(net=frozen), "no matrix of the model is left for SoftMuon")
    for stage in (0, 3):
        refuses(lambda s=stage: started(s), "ZeRO 1 and 2 alone", f"stage {stage}")
    refuses(lambda: started(params={"soft_start": 0.5}), "the length of the run is not known")
    refuses(lambda: started(params={**PARAMS, "scale_mode": "frobenius"}), "spectral, unit_rms_norm, shape_scaling")
    refuses(lambda: started(params={**PARAMS, "tp_mode": "blockwise"}), "'tp_mode'")
    client = SoftMuon([(net := Net()).linear], weight_decay=on.DECAY, **PHASES)
    refuses(lambda: on.Run(1, client=client, net=net), '{"type": "SoftMuon"}')
    s3, ours = on.Run(1).s3, started().engine.basic_optimizer
    refuses(lambda: ours.load_state_dict(s3.state_dict()), "written by optimizer s3, and SoftMuon cannot continue it")
    refuses(lambda: s3.load_state_dict(ours.state_dict()), "written by optimizer softmuon, and S3 cannot continue it")
