"""Runs on ranks: SoftMuon with DTensors of every placement, against the unsharded run; part of fsdp2.py's launches."""

import copy
import itertools
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from s3_megatron.optim.softmuon import SoftMuon
from s3_megatron.optim.state import EXP_AVG
from tests.optim.dtensors import replicas_are_equal, whole
from tests.optim.fsdp2 import Run, load, save
from tests.rank_checks import refuses

LR, DECAY, STEPS = 1e-2, 0.1, 8
# Hard until step 3, soft until 9.
PHASES = {"sign_iters": 3, "transition_iters": 6, "weight_decay": DECAY}


class Layers(nn.Module):
    """Five matrices of one shape, which no number of ranks divides, others with fewer rows than ranks, and a stack."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(7, 7)] * 5 + [(7, 3), (3, 10), (10, 1)]
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in sizes)
        self.experts = nn.Parameter(torch.randn(5, 4, 7))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.einsum("bi,eoi,eoj->bj", x, self.experts, self.experts) / 50
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def make(sharded: bool) -> Run:
    torch.manual_seed(1)
    net = Layers()
    if sharded:
        for layer in net.layers[:3]:
            fully_shard(layer)
        fully_shard(net)
    return Run(net, SoftMuon(net.parameters(), LR, **PHASES))


def train(run: Run, steps: range) -> None:
    for step in steps:
        x = torch.randn(6, 7, generator=torch.Generator().manual_seed(step))
        run.optimizer.zero_grad()
        # So that singular values of 1e-8 do not leave tau at its highest.
        (1e3 * run.net(x)).square().mean().backward()
        run.optimizer.step()


def compare(one: SoftMuon, other: SoftMuon, tolerance: float) -> None:
    """Weights and m, relative or of a step: the matrices that are mapped are the same, but for the last bit of what
    runs element by element, which the vector loop and its tail may round differently."""
    params = (optimizer.param_groups[0]["params"] for optimizer in (one, other))
    for i, (a, b) in enumerate(zip(*params, strict=True)):
        for x, y in ((a, b), (one.state[a][EXP_AVG], other.state[b][EXP_AVG])):
            torch.testing.assert_close(
                whole(x), whole(y), rtol=tolerance, atol=tolerance * LR, msg=lambda m, i=i: f"{i}: {m}"
            )


def check_softmuon_sharded_equals_unsharded() -> None:
    sharded, plain = make(True), make(False)
    for run in (sharded, plain):
        train(run, range(STEPS))
    compare(sharded.optimizer, plain.optimizer, 1e-6)
    one, other = (run.optimizer.param_groups[0] for run in (sharded, plain))
    assert one["soft_first"] == 3 and 1 < sharded.optimizer.tau < 1e8
    assert all(
        one[name] == other[name] for name in ("soft_mu", "soft_sigma", "soft_first", "soft_norm", "soft_largest")
    )
    assert all(isinstance(state[EXP_AVG], DTensor) for state in sharded.optimizer.state.values())


def check_softmuon_goes_on_from_a_checkpoint_in_both_phases() -> None:
    """What 2 ranks have written goes on on 4 and on 1; on the same number of ranks no bit changes."""
    for saved_at in (2, 6):
        folder = Path(sys.argv[2]) / f"softmuon-{saved_at}"
        straight = make(True)
        train(straight, range(saved_at))
        if dist.get_world_size() == 2:
            save(straight, folder)
        train(straight, range(saved_at, STEPS))
        resumed = make(True)
        load(resumed, folder)
        assert resumed.optimizer.param_groups[0]["steps_taken"] == saved_at
        train(resumed, range(saved_at, STEPS))
        compare(straight.optimizer, resumed.optimizer, 0.0 if dist.get_world_size() == 2 else 1e-6)
        assert resumed.optimizer.tau == straight.optimizer.tau < 1e8


def check_softmuon_under_torchs_checkpoint_options() -> None:
    """torch's full_state_dict takes a tuple in a param group apart, and cannot load it where there is a None."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in ("full_state_dict", "flatten_optimizer_state_dict", "cpu_offload"):
        options = StateDictOptions(**{name: True})
        runs = []
        for _ in range(2):
            torch.manual_seed(1)
            net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Linear(8, 5, bias=False))
            fully_shard(net, mesh=mesh)
            groups = [{"params": [net[0].weight], "qkv_split_shapes": (2, 1, 1)}, {"params": [net[1].weight]}]
            runs.append((net, SoftMuon(groups, LR, **PHASES)))

        def step(net: nn.Module, optimizer: SoftMuon, steps: range) -> None:
            for i in steps:
                for j, p in enumerate(net.parameters()):
                    grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * i + j))
                    p.grad = distribute_tensor(grad, mesh, p.placements)
                optimizer.step()

        step(*runs[0], range(5))
        model, state = copy.deepcopy(get_state_dict(*runs[0], options=options))
        set_state_dict(*runs[1], model_state_dict=model, optim_state_dict=state, options=options)
        for run in runs:
            step(*run, range(5, 7))
        compare(runs[0][1], runs[1][1], 0.0)
        assert list(runs[1][1].param_groups[0]["qkv_split_shapes"]) == [2, 1, 1]
        assert runs[0][1].tau == runs[1][1].tau < 1e8


def check_softmuon_in_every_placement() -> None:
    """Gradients placed otherwise than their weight, too; replicas stay equal to the bit."""
    ranks = dist.get_world_size()
    flat = init_device_mesh("cpu", (ranks,))
    cases = [
        (flat, at, of_grad)
        for at, of_grad in itertools.product(([Replicate()], [Shard(0)], [Shard(1)]), ([Partial()], [Shard(1)], None))
    ]
    if ranks == 4:
        square = init_device_mesh("cpu", (2, 2))
        pairs = (
            [Replicate(), Shard(0)],
            [Shard(0), Shard(1)],
            [Shard(1), Shard(0)],
            [Shard(0), Shard(0)],
            [Shard(1), Replicate()],
        )
        cases += [(square, at, None) for at in pairs]
    shapes = [(7, 5), (7, 5), (7, 5), (1, 6), (5, 9), (3, 4, 5)]
    for mesh, at, of_grad in cases:
        torch.manual_seed(0)
        values = [torch.randn(shape) for shape in shapes]
        plain = [nn.Parameter(x.clone()) for x in values]
        parts = [nn.Parameter(distribute_tensor(x, mesh, at)) for x in values]
        # A plain matrix beside them is on every rank, and counts once for the temperature.
        beside = torch.randn(4, 6)
        plain.append(nn.Parameter(beside.clone()))
        parts.append(nn.Parameter(beside.clone()))
        optimizers = [SoftMuon(params, LR, **PHASES) for params in (plain, parts)]
        for _ in range(6):
            for p, q in zip(plain, parts, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = distribute_tensor(p.grad, mesh, of_grad or at) if isinstance(q, DTensor) else p.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        one, other = (optimizer.schedule for optimizer in optimizers)
        assert one == other, (mesh, at, one, other)
        compare(optimizers[1], optimizers[0], 1e-6)
        for q in parts[:-1]:
            replicas_are_equal(q, (mesh, at))
    pending = nn.Parameter(DTensor.from_local(torch.ones(3, 3), flat, [Partial()]))
    pending.grad = DTensor.from_local(torch.ones(3, 3), flat, [Partial()])
    refuses(lambda: SoftMuon([pending], soft_start=1).step(), "a sum still to be made")


def check_softmuon_with_tensor_parallelism_under_fsdp2() -> None:
    """Shards of shards, which redistribute() does not take apart: gathered on every rank. To 1e-4 of a step: sums over
    the tensor-parallel ranks round the gradient otherwise, by 1e-7, and the map multiplies that by up to 1/s."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (max(1, ranks // 2), min(2, ranks)), mesh_dim_names=("dp", "tp"))
    optimizers = []
    for sharded in (False, True):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False))
        if sharded:
            parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
            fully_shard(net, mesh=mesh["dp"])
        optimizers.append(SoftMuon(net.parameters(), LR, fp32_matmul_prec="highest", **PHASES))
        for step in range(STEPS):
            x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
            optimizers[-1].zero_grad()
            (net(x) - x.roll(1, 1)).square().mean().backward()
            optimizers[-1].step()
    compare(optimizers[1], optimizers[0], 1e-4)
    one, other = (optimizer.schedule for optimizer in optimizers)
    assert abs(one.mu - other.mu) <= 1e-5 * one.mu and one[2:] == other[2:]


def check_softmuon_under_zero_redundancy() -> None:
    """Whole matrices on one rank each, and on 4 ranks one rank without any: the temperature is all ranks'."""
    torch.manual_seed(1)
    whole_run = [nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (6, 6), (5, 9))]
    shared_run = [nn.Parameter(x.detach().clone()) for x in whole_run]
    plain = SoftMuon(whole_run, LR, **PHASES)
    zero = ZeroRedundancyOptimizer(shared_run, optimizer_class=SoftMuon, lr=LR, **PHASES)
    for step in range(STEPS):
        for i, (p, q) in enumerate(zip(whole_run, shared_run, strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            q.grad = p.grad.clone()
        plain.step()
        zero.step()
    assert zero.optim.schedule == plain.schedule and plain.schedule is not None
    assert all(torch.equal(p, q) for p, q in zip(whole_run, shared_run, strict=True))


def check_softmuon_leaves_a_whole_matrix_whose_gradient_is_nan_in_one_part() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for dim in (0, 1):
        torch.manual_seed(0)
        params = [nn.Parameter(distribute_tensor(torch.randn(7, 6), mesh, [Shard(dim)])) for _ in range(3)]
        before = [whole(p).clone() for p in params]
        optimizer = SoftMuon(params, LR, sign_iters=0, transition_iters=4, weight_decay=DECAY)
        for bad, p in zip((math.nan, 0.0, math.inf), params, strict=True):
            grad = torch.randn(7, 6)
            grad[6, 0] += bad
            p.grad = distribute_tensor(grad, mesh, [Shard(dim)])
        optimizer.step()
        moved = [not torch.equal(whole(p), x) for p, x in zip(params, before, strict=True)]
        assert moved == [False, True, False], moved
        assert whole(optimizer.state[params[0]][EXP_AVG]).eq(0).all()
