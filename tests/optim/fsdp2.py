"""Runs on ranks: S3 in plain PyTorch's FSDP2 (``fully_shard``), against the unsharded run.

A check is a function whose name starts with ``check_``, here or in a ..._ranks.py, and one test in
test_fsdp2.py; tests/rank_checks.py runs them.
"""

import copy
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from s3_megatron.optim import EXP_AVG, EXP_AVG_ROOT, S3, from_adam_state
from s3_megatron.watch.file import read_metrics
from s3_megatron.watch.observer import Observer
from tests import rank_checks
from tests.optim.dtensors import replicas_are_equal, whole
from tests.rank_checks import refuses, shared_folder

STEPS = 10
LR, DECAY = 3e-3, 0.1
SHARED = Path(sys.argv[2]) / "saved"


class Net(nn.Module):
    """Odd sizes, so that shards are uneven, and a weight that only the first rank holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(101, 13)
        self.norm = nn.LayerNorm(13)
        self.linear = nn.Linear(13, 27)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.norm(self.embedding(tokens))) * self.scale


def make(sharded: bool, policy: MixedPrecisionPolicy | None = None, kind: type = S3, **settings: object) -> "Run":
    """A model, whose weights are the same in every run, with its optimizer; some weights do not decay."""
    torch.manual_seed(1)
    net = Net()
    if sharded:
        policy = policy or MixedPrecisionPolicy()
        fully_shard(net.linear, mp_policy=policy)
        fully_shard(net, mp_policy=policy)
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim == 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return Run(net, kind(groups, lr=LR, weight_decay=DECAY, **settings))


class Run:
    """A model and its optimizer, trained on the same batches on every rank.

    The mean of equal gradients over 2 or 4 ranks is exact, so a sharded run may differ from an unsharded one by S3's
    own arithmetic alone.
    """

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.net, self.optimizer = net, optimizer

    def train(self, steps: range, clip: float | None = None) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(101, (4, 16), generator=generator)
            self.optimizer.zero_grad()
            self.net(tokens).float().square().mean().backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(self.net.parameters(), clip)
            self.optimizer.step()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights and states, whole."""
        for name, param in self.net.named_parameters():
            yield f"weight of {name}", whole(param)
            for kind in self.optimizer.spec.state_names:
                yield f"{kind} of {name}", whole(self.optimizer.state[param][kind])


def compare(one: Run, other: Run, tolerance: float = 1e-6) -> None:
    """Weights, m and r to ``tolerance``, relative or of the longest step.

    1e-6 is about 8 ULP of float32: the same arithmetic, but an element may fall into a vector register in one run and
    into the loop's tail in the other, and a difference grows with ten steps.
    """
    for (name, a), (_, b) in zip(one.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * LR, msg=lambda m, n=name: f"{n}: {m}")


def check_sharded_equals_unsharded() -> None:
    sharded, unsharded = make(True), make(False)
    before = dict(sharded.tensors()) if sharded.optimizer.state else {}
    assert not before, "no state before the first step"
    for run in (sharded, unsharded):
        run.train(range(STEPS))
    compare(sharded, unsharded)
    moved = make(False).net.state_dict()
    assert all(not torch.equal(moved[name], param) for name, param in unsharded.net.named_parameters())


def check_clipping_equals_the_unsharded_run() -> None:
    sharded, unsharded = make(True), make(False)
    for run in (sharded, unsharded):
        run.train(range(STEPS), clip=1e-3)
    compare(sharded, unsharded)


def check_an_observer_has_the_sizes_of_all_ranks() -> None:
    """Plain PyTorch in three lines, sharded: the last rank writes, and sizes are those of the unsharded run, of S3 and
    of AdamW. The update is computed from states that differ by 1e-6, as the weights do. A rank's shard was taken for
    the model: half of its weights on two ranks, and 8 bytes of state for each."""
    for kind in (S3, torch.optim.AdamW):
        sizes = []
        for sharded in (True, False):
            run, folder = make(sharded, kind=kind), shared_folder()
            observer = Observer(folder, run.optimizer)
            for step in range(3):
                run.train(range(step, step + 1))
                observer.train(step + 1, {"loss": 1.0})
            dist.barrier()  # the last rank writes when the others have gone on
            found = read_metrics(folder)
            assert found.optimizer is not None and found.optimizer.world_size == dist.get_world_size()
            elements = sum(param.numel() for param in run.net.parameters())
            shards, bytes_a_weight = found.optimizer.shard_elements, found.optimizer.state_bytes_per_param_rank
            assert sum(shards) == elements * (1 if sharded else dist.get_world_size())
            assert found.optimizer.parameters == elements and bytes_a_weight == 8 * max(shards) / elements
            sizes.append(found.train[3].updates.named())
        for name, value in sizes[0].items():
            other = sizes[1][name]
            assert value == other or abs(value / other - 1) < 1e-5, f"{kind.__name__} {name}: {value} and {other}"


def check_state_is_partitioned() -> None:
    """Every element once over the ranks; a rank without a part of a weight takes part with an empty one."""
    run = make(True)
    run.train(range(1))
    for param in run.net.parameters():
        state = run.optimizer.state[param]
        assert set(state) == {EXP_AVG, EXP_AVG_ROOT}
        for tensor in state.values():
            assert isinstance(tensor, DTensor) and tensor.placements == param.placements
            mine = torch.tensor([tensor.to_local().numel()])
            dist.all_reduce(mine)
            assert mine.item() == param.numel()
    empty = run.net.scale.to_local().numel()
    assert empty == (1 if dist.get_rank() == 0 else 0)


def check_bfloat16_policy_keeps_float32_weights() -> None:
    """Weights and states stay float32 under a bfloat16 policy; the gradients it makes move them."""
    run = make(True, MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    run.train(range(STEPS))
    start = make(False).net.state_dict()
    for name, tensor in run.tensors():
        assert tensor.dtype == torch.float32 and tensor.isfinite().all(), name
    moved = {name: (p.full_tensor() - start[name]).abs().max() for name, p in run.net.named_parameters()}
    # 10 steps of at most a rate each, and decay of weights below 4.
    assert all(0 < far <= STEPS * LR * (1 + 4 * DECAY) for far in moved.values()), moved


def check_saving_and_loading_in_the_middle_changes_no_bit() -> None:
    for settings in ({}, {"state_dtype": torch.bfloat16, "rounding_seed": 3}):
        first, second = make(True, **settings), make(True, **settings)
        first.train(range(3))
        folder = shared_folder()
        save(first, folder)
        load(second, folder)
        for run in (first, second):
            run.train(range(3, 6))
        compare(first, second, tolerance=0.0)


def check_loading_on_other_ranks() -> None:
    """What 2 ranks have written at step 3 goes on here, on any number of them, as if it had never stopped."""
    if dist.get_world_size() == 2:
        first = make(True)
        first.train(range(3))
        save(first, SHARED)
    resumed, unsharded = make(True), make(False)
    load(resumed, SHARED)
    resumed.train(range(3, STEPS))
    unsharded.train(range(STEPS))
    compare(resumed, unsharded)
    assert all(group["betas"] == (0.95, 0.95) for group in resumed.optimizer.param_groups)


def check_adams_state_is_refused_and_converted() -> None:
    adam = make(True, kind=torch.optim.AdamW)
    adam.train(range(3))
    s3 = make(True)
    refuses(lambda: s3.optimizer.load_state_dict(adam.optimizer.state_dict()), "from_adam_state")
    s3.optimizer.load_state_dict(from_adam_state(adam.optimizer.state_dict(), s3.optimizer))
    for old, new in zip(adam.net.parameters(), s3.net.parameters(), strict=True):
        before, after = adam.optimizer.state[old], s3.optimizer.state[new]
        assert torch.equal(before["exp_avg"].to_local(), after[EXP_AVG].to_local())
        assert torch.equal(before["exp_avg_sq"].to_local().sqrt(), after[EXP_AVG_ROOT].to_local())
    s3.train(range(3, 5))


class Block(nn.Module):
    """Sizes that 2 and 4 ranks divide, as torch's plans ask, and a scale outside every plan: a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.out = nn.Linear(8, 12, bias=False)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.down(torch.tanh(self.up(self.norm(x))))).square().mean((1, 2)) @ self.scale


PLAN = {
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1)),
    "out": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}


def plans() -> dict[str, DeviceMesh]:
    """torch's ways to share a model out over this many ranks."""
    ranks = dist.get_world_size()
    meshes = {"TP": init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))}
    if ranks > 1:
        square = (ranks // 2, 2)
        meshes["TP+FSDP2"] = init_device_mesh("cpu", square, mesh_dim_names=("dp", "tp"))
        meshes["HSDP"] = init_device_mesh("cpu", square, mesh_dim_names=("replicate", "shard"))
    return meshes


def share_out(model: nn.Module, plan: str, mesh: DeviceMesh) -> None:
    if plan.startswith("TP"):
        parallelize_module(model, mesh["tp"], PLAN)
    if plan == "TP+FSDP2":
        fully_shard(model, mesh=mesh["dp"], ignored_params={model.scale})
    if plan == "HSDP":
        fully_shard(model, mesh=mesh)


def check_torchs_plans_equal_the_unsharded_run() -> None:
    """Incident: under SequenceParallel the gradient of a replicated norm is a sum still to be made. S3 took each rank's
    summand, and after five steps the replicas of one weight were 3.2e-2 apart; AdamW's are equal to the bit."""
    x = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    for plan, mesh in plans().items():
        for kind, settings in ((S3, {}), (S3, {"implementation": "foreach"}), (torch.optim.AdamW, {})):
            torch.manual_seed(0)
            alone, part = Block(), Block()
            part.load_state_dict(alone.state_dict())
            share_out(part, plan, mesh)
            own = x.chunk(mesh["tp"].size(), 1)[mesh["tp"].get_local_rank()] if plan.startswith("TP") else x
            seen = set()
            for model, data in ((alone, x), (part, own)):
                optimizer = kind(model.parameters(), lr=LR, weight_decay=DECAY, **settings)
                for _ in range(5):
                    optimizer.zero_grad()
                    model(data).sum().backward()
                    seen |= {grad.placements for p in model.parameters() if isinstance(grad := p.grad, DTensor)}
                    optimizer.step()
            assert plan != "TP" or (Partial(),) in seen, seen
            for (name, a), b in zip(part.named_parameters(), alone.parameters(), strict=True):
                where = f"{plan}, {kind.__name__} {settings}: {name}"
                torch.testing.assert_close(whole(a), b, rtol=1e-6, atol=1e-6, msg=lambda m, w=where: f"{w}: {m}")
                if isinstance(a, DTensor):
                    replicas_are_equal(a, where)


def check_gradients_and_states_placed_otherwise_than_their_weight() -> None:
    """Incident: a weight replicated and its gradient sharded: the C++ loop read past the gradient's end. Sizes that no
    number of ranks divides, fewer elements than ranks, and a plain weight in the same list."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ways = ([Replicate()], [Shard(0)], [Shard(1)], [Partial()])
    for at, of_grad, of_state in itertools.product(ways[:3], ways, ways[:3]):
        torch.manual_seed(0)
        values = [torch.randn(7, 5), torch.randn(1, 3), torch.randn(5)]
        plain = [nn.Parameter(x.clone()) for x in values]
        parts = [nn.Parameter(distribute_tensor(x, mesh, at)) for x in values[:2]] + [nn.Parameter(values[2].clone())]
        optimizers = [S3(params, lr=LR, weight_decay=DECAY) for params in (plain, parts)]
        for step in range(3):
            for p, q in zip(plain, parts, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = distribute_tensor(p.grad, mesh, of_grad) if isinstance(q, DTensor) else p.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
            if step == 0:  # as whoever loads a checkpoint by hand may leave it
                for entry in list(optimizers[1].state.values())[:2]:
                    for name, m in entry.items():
                        entry[name] = m.redistribute(placements=of_state)
        for p, q in zip(plain, parts, strict=True):
            torch.testing.assert_close(whole(q), p, rtol=1e-6, atol=1e-8)
    pending = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    pending.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    refuses(lambda: S3([pending]).step(), "a sum still to be made")


def check_zero_redundancy_keeps_s3s_state_and_refuses_adams() -> None:
    """Incident: ZeroRedundancyOptimizer writes state and groups into the optimizer that it wraps, past load_state_dict:
    Adam's state was silently taken for S3's, with betas (0.9, 0.999) and v where r belongs."""

    def run(kind: type, state: dict[str, Any] | None = None) -> tuple[list[Tensor], dict[str, Any]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=kind, lr=LR, weight_decay=DECAY)
        if state is not None:
            optimizer.load_state_dict(state)
        model(torch.ones(2, 8)).square().mean().backward()
        optimizer.step()
        optimizer.consolidate_state_dict(0)
        box = [optimizer.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box, 0)
        return list(model.parameters()), box[0]

    refuses(lambda: run(S3, run(torch.optim.AdamW)[1]), "was not written by S3")
    once, saved = run(S3)
    twice, _ = run(S3, saved)
    assert not any(torch.equal(a, b) for a, b in zip(once, twice, strict=True)), (
        "the state that was saved had no effect"
    )


# What state is got with, and set with.
DOORS: dict[str, tuple[dict[str, bool], dict[str, bool]]] = {
    "plain": ({}, {}),
    "full": ({"full_state_dict": True}, {"full_state_dict": True}),
    "flat": ({"flatten_optimizer_state_dict": True}, {"flatten_optimizer_state_dict": True}),
    "sharded on the CPU": ({"cpu_offload": True}, {"cpu_offload": True}),
    # The first rank alone gets the whole, and hands it out.
    "rank 0's": (
        {"full_state_dict": True, "cpu_offload": True},
        {"full_state_dict": True, "broadcast_from_rank0": True},
    ),
}


def check_options_of_torchs_checkpoint_functions() -> None:
    """S3's groups hold a pair of betas, flags, None and a mark; AdamW, the control, has most of these too."""
    for kind, (name, (getting, setting)) in itertools.product((torch.optim.AdamW, S3), DOORS.items()):
        first, second = make(True, kind=kind), make(True, kind=kind)
        first.train(range(3))
        # Copied, as by a file: torch's load keeps the very tensors that it gets, AdamW's too.
        model, state = copy.deepcopy(get_state_dict(first.net, first.optimizer, options=StateDictOptions(**getting)))
        assert bool(state) == (name != "rank 0's" or dist.get_rank() == 0)
        options = StateDictOptions(**setting)
        try:
            # Not set_state_dict, for which an empty dict is nothing to load: rank 0 would wait for the others for ever.
            set_model_state_dict(second.net, model, options=options)
            set_optimizer_state_dict(second.net, second.optimizer, state, options=options)
        except Exception as error:
            raise AssertionError(f"{kind.__name__}, {name}: {error}") from error
        for run in (first, second):
            run.train(range(3, 5))
        if kind is S3:
            compare(first, second, tolerance=0.0)


def save(run: Run, folder: Path) -> None:
    model, optimizer = get_state_dict(run.net, run.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)


def load(run: Run, folder: Path) -> None:
    model, optimizer = get_state_dict(run.net, run.optimizer)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(run.net, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


if __name__ == "__main__":
    from tests.optim import softmuon_ranks, softsignum_ranks  # which import this module

    dist.init_process_group("gloo")
    found = rank_checks.named(sys.modules[__name__], softsignum_ranks, softmuon_ranks)
    rank_checks.run(found, sys.argv[3:], Path(sys.argv[1]))
    dist.destroy_process_group()
