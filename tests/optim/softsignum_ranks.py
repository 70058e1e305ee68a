"""Runs on ranks, within fsdp2.py's launches: SoftSignum sharded against unsharded, and its temperature over ranks.

A check is a function whose name starts with ``check_``; tests/optim/test_fsdp2.py has one test for each.
"""

import itertools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from s3_megatron.optim import EXP_AVG, SoftSignum
from s3_megatron.optim.pooled_median import median_and_deviation
from tests.optim import fsdp2
from tests.optim.fsdp2 import DECAY, LR, SHARED, Block, Run, load, plans, save, share_out
from tests.rank_checks import refuses, shared_folder

STEPS = 10
# Hard to step 4, soft from step 5.
RUN = {"total_steps": STEPS, "soft_start": 0.5}


def make(sharded: bool, **settings: object) -> Run:
    return fsdp2.make(sharded, kind=SoftSignum, **(RUN | settings))


def compare(one: Run, other: Run, tolerance: float = 1e-6) -> None:
    """As fsdp2.compare; the medians, too."""
    fsdp2.compare(one, other, tolerance)
    same_temperature(one.optimizer, other.optimizer, tolerance)


def same_temperature(one: SoftSignum, other: SoftSignum, tolerance: float) -> None:
    a, b = one.schedule, other.schedule
    assert a is not None and b is not None and a[2:] == b[2:], (a, b)
    assert all(abs(x - y) <= tolerance * b.sigma for x, y in zip(a[:2], b[:2], strict=True)), (a, b)
    assert a.sigma > 0 and one.param_groups[0]["steps_taken"] == other.param_groups[0]["steps_taken"]


def check_softsignum_sharded_equals_unsharded() -> None:
    sharded, whole = make(True), make(False)
    for run in (sharded, whole):
        run.train(range(STEPS))
    compare(sharded, whole)
    # One number for the whole model: the ranks' own medians differ from it.
    m = torch.cat([t.flatten() for name, t in make_first_soft(True).tensors() if name.startswith(EXP_AVG)])
    mu = m.median()
    assert sharded.optimizer.schedule[:2] == (mu.item(), (m - mu).abs().median().item())


def make_first_soft(sharded: bool) -> Run:
    run = make(sharded)
    run.train(range(6))
    return run


def check_softsignum_saved_in_both_phases_goes_on_to_the_bit() -> None:
    for moment, settings in itertools.product((3, 7), ({}, {"state_dtype": torch.bfloat16, "rounding_seed": 3})):
        first, second = make(True, **settings), make(True, **settings)
        first.train(range(moment))
        folder = shared_folder()
        save(first, folder)
        load(second, folder)
        for run in (first, second):
            run.train(range(moment, STEPS))
        compare(first, second, tolerance=0.0)


def check_softsignum_goes_on_on_other_ranks() -> None:
    """What 2 ranks have written in the soft phase goes on here, on any number of them, at the temperatures it had."""
    folder = SHARED.with_name("softsignum")
    if dist.get_world_size() == 2:
        first = make(True)
        first.train(range(7))
        save(first, folder)
    resumed, whole = make(True), make(False)
    load(resumed, folder)
    resumed.train(range(7, STEPS))
    whole.train(range(STEPS))
    compare(resumed, whole)


def check_softsignum_counts_replicas_once_in_torchs_plans() -> None:
    """Norms and biases are on every rank of a tensor-parallel mesh, matrices are not, and a scale is a plain tensor:
    counted once each, the temperature is the whole model's. Weight decay on."""
    x = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    for plan, mesh in plans().items():
        torch.manual_seed(0)
        whole, part = Block(), Block()
        part.load_state_dict(whole.state_dict())
        share_out(part, plan, mesh)
        own = x.chunk(mesh["tp"].size(), 1)[mesh["tp"].get_local_rank()] if plan.startswith("TP") else x
        optimizers = []
        for model, data in ((whole, x), (part, own)):
            optimizer = SoftSignum(model.parameters(), lr=LR, weight_decay=DECAY, sign_iters=0, transition_iters=6)
            for _ in range(4):
                optimizer.zero_grad()
                model(data).sum().backward()
                optimizer.step()
            optimizers.append(optimizer)
        # Sums over ranks and over one rank round differently: 1e-6 of a gradient, and so of sigma.
        same_temperature(optimizers[1], optimizers[0], 1e-5)


def check_medians_do_not_depend_on_the_number_of_ranks() -> None:
    """To the bit: elements shared out unevenly, some ranks without any, equal those of one rank that has them all.

    Every rank computes the latter by itself, from the same numbers on 1, 2 and 4 ranks.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(10_007, generator=generator) * 1e-4
    samples = {
        "odd": normal,
        "even": normal[1:],
        "bfloat16": normal.bfloat16(),
        "float64": normal.double() ** 3,
        "small": normal * 1e-36,  # half of it denormal
        "zeros": torch.zeros(101),
        "signed zeros": torch.zeros(101) * normal[:101].sign(),
        "mostly zeros": torch.where(torch.rand(999, generator=generator) < 0.4, normal[:999], -0.0),
        "one": normal[:1],
        "few": normal[:3],
    }
    known = {}
    for name, sample in samples.items():
        expected = median_and_deviation([sample])
        # Cut at uneven places: the second rank has nothing, the last one most.
        cuts = [0, *sorted(len(sample) * (i // 2 * 2 + 1) // (3 * ranks) for i in range(ranks - 1)), len(sample)]
        mine = sample[cuts[rank] : cuts[rank + 1]]
        assert median_and_deviation([mine[::2], mine[1::2]], dist.group.WORLD) == expected, name
        # A replica on every rank.
        assert median_and_deviation([sample], dist.group.WORLD) == expected, name
        known[name] = expected
    # Only one rank has a float64 part; and none has any element.
    parts = [samples["float64"]] if rank == 0 else [samples["odd"][rank::ranks]]
    mixed = torch.cat([samples["float64"], *(samples["odd"][r::ranks].double() for r in range(1, ranks))])
    assert median_and_deviation(parts, dist.group.WORLD) == median_and_deviation([mixed])
    assert median_and_deviation([], dist.group.WORLD) == (0.0, 0.0)
    assert known["odd"][1] > 0 and known["zeros"] == known["signed zeros"] == (0.0, 0.0)


def check_softsignum_under_zero_redundancy_and_on_a_rank_without_parameters() -> None:
    """Each weight is one rank's; on 4 ranks two of them have none, and take part in the median."""

    def run(zero: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 4)) if dist.get_world_size() < 4 else nn.Linear(8, 5)
        settings = {"lr": LR, "weight_decay": DECAY, **RUN}
        if zero:
            optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=SoftSignum, **settings)
        else:
            optimizer = SoftSignum(model.parameters(), **settings)
        for step in range(STEPS):
            optimizer.zero_grad()
            x = torch.randn(3, 8, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
        inner = optimizer.optim if zero else optimizer
        assert inner.schedule is not None and inner.schedule.first == 5
        return [x.detach() for x in model.parameters()] + [torch.tensor(inner.schedule[:2])]

    assert all(map(torch.equal, run(True), run(False)))


def check_an_engine_chooses_what_is_counted() -> None:
    """A flat partition with padding, and a weight that every rank has, counted by the first: as one rank with both."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(3)
    flat, shared = torch.randn(21, generator=generator), torch.randn(6, generator=generator)
    size = -(-21 // ranks)
    own = flat[rank * size : (rank + 1) * size]
    partition, copy = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(6))
    optimizer = SoftSignum([partition, copy], lr=LR, weight_decay=DECAY, sign_iters=0, transition_iters=3)
    optimizer.counted = lambda param, m: m[: len(own)] if param is partition else m[: 6 * (rank == 0)]
    partition.grad, copy.grad = torch.cat([own, torch.zeros(size - len(own))]), shared
    optimizer.step()
    whole = nn.Parameter(torch.zeros(27))
    alone = SoftSignum([whole], lr=LR, weight_decay=DECAY, sign_iters=0, transition_iters=3)
    whole.grad = torch.cat([flat, shared])
    alone.step()  # on every rank the same: replicas do not change a median
    assert optimizer.schedule == alone.schedule


def check_meshes_and_groups_that_do_not_fit_are_refused() -> None:
    ranks = dist.get_world_size()
    groups = [dist.new_group([r]) for r in range(ranks)]
    if ranks == 1:
        return
    other = groups[(dist.get_rank() + 1) % ranks]
    refuses(lambda: SoftSignum([nn.Parameter(torch.ones(2))], process_group=other, **RUN), "not in process_group")
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("stage", "dp")) if ranks == 4 else None
    if mesh is not None:
        net = nn.Linear(3, 5)
        fully_shard(net, mesh=mesh["dp"])
        refuses(lambda: SoftSignum(net.parameters(), **RUN), "is on 2 of 4 ranks: give process_group")
        SoftSignum(net.parameters(), soft_start=1)
        # Two stages of a pipeline, each on its own mesh: one temperature.
        optimizer = SoftSignum(net.parameters(), process_group=dist.group.WORLD, sign_iters=0, transition_iters=2)
        stage = mesh.get_local_rank("stage")
        for param in net.parameters():
            values = torch.full(param.shape, 1.0 + stage)
            param.grad = distribute_tensor(values, mesh["dp"], [Shard(0)])
        optimizer.step()
        # Of 18 coordinates at .1 and 18 at .2 the lower median is .1, and half of the deviations are 0.
        assert optimizer.schedule[:2] == (torch.tensor(0.1).item(), 0.0), optimizer.schedule
    # A group of this rank alone: its own temperature, and no wait for others.
    x = nn.Parameter(torch.ones(3))
    mine = groups[dist.get_rank()]
    optimizer = SoftSignum([x], lr=LR, weight_decay=DECAY, sign_iters=0, transition_iters=2, process_group=mine)
    x.grad = torch.full((3,), 1.0 + dist.get_rank())
    optimizer.step()
    assert optimizer.schedule.mu == torch.tensor(0.0).lerp(x.grad, 1 - 0.9)[0].item()


def check_a_gradient_placed_otherwise_is_redistributed() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    value, grad = torch.randn(7, 5), torch.randn(7, 5)
    whole, part = nn.Parameter(value.clone()), nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
    whole.grad, part.grad = grad, distribute_tensor(grad, mesh, [Replicate()])
    for x in (whole, part):
        SoftSignum([x], lr=LR, weight_decay=DECAY, soft_start=1).step()
    torch.testing.assert_close(part.full_tensor(), whole, rtol=1e-6, atol=1e-8)
