"""Runs on ranks: S3 in plain PyTorch's FSDP2 (``fully_shard``), against the unsharded run.

A check is a function whose name starts with ``check_``, and one test in test_fsdp2.py; tests/checks.py runs them.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from s3_megatron.optim import EXP_AVG, EXP_AVG_ROOT, S3, from_adam_state
from tests import checks
from tests.checks import refuses, shared_folder

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
        """Weights, m and r, whole."""
        for name, param in self.net.named_parameters():
            state = self.optimizer.state[param]
            for kind, tensor in (("x", param.detach()), ("m", state[EXP_AVG]), ("r", state[EXP_AVG_ROOT])):
                yield f"{kind} of {name}", tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(one: Run, other: Run, tolerance: float = 1e-6) -> None:
    """Weights, m and r to ``tolerance``, relative or of the longest step.

    1e-6 is about 8 ULP of float32: the same arithmetic, but an element may fall into a vector register in one run and
    into the loop's tail in the other, and a difference grows with ten steps.
    """
    for (name, a), (_, b) in zip(one.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * LR, msg=lambda m, n=name: f"{n}: {m}")


def check_sharded_equals_unsharded() -> None:
    sharded, whole = make(True), make(False)
    before = dict(sharded.tensors()) if sharded.optimizer.state else {}
    assert not before, "no state before the first step"
    for run in (sharded, whole):
        run.train(range(STEPS))
    compare(sharded, whole)
    moved = make(False).net.state_dict()
    assert all(not torch.equal(moved[name], param) for name, param in whole.net.named_parameters())


def check_clipping_equals_the_unsharded_run() -> None:
    sharded, whole = make(True), make(False)
    for run in (sharded, whole):
        run.train(range(STEPS), clip=1e-3)
    compare(sharded, whole)


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
    resumed, whole = make(True), make(False)
    load(resumed, SHARED)
    resumed.train(range(3, STEPS))
    whole.train(range(STEPS))
    compare(resumed, whole)
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


def save(run: Run, folder: Path) -> None:
    model, optimizer = get_state_dict(run.net, run.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)


def load(run: Run, folder: Path) -> None:
    model, optimizer = get_state_dict(run.net, run.optimizer)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(run.net, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    checks.run(checks.named(globals()), sys.argv[3:], Path(sys.argv[1]))
    dist.destroy_process_group()
