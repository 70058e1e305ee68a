"""Runs on ranks, from worker.py: SoftSignum with experts, which DeepSpeed has on other ranks than dense weights."""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups, safe_get_full_optimizer_state
from torch import Tensor, nn

from s3_megatron.engines.deepspeed.layout import masters
from s3_megatron.optim import EXP_AVG, SoftSignum
from s3_megatron.optim.pooled_median import median_and_deviation
from tests.engines.deepspeed import harness as on
from tests.engines.deepspeed.checkpoints import load
from tests.engines.deepspeed.window import OLD
from tests.rank_checks import refuses, shared_folder

STEPS, HARD, EXPERT_RANKS = 8, 4, 2


class Net(nn.Module):
    """A linear layer and four experts, two on each of two ranks; on four ranks two have the same ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 8)
        expert = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
        torch.manual_seed(1 + dist.get_rank() % EXPERT_RANKS)
        sizes = {"num_experts": 4, "ep_size": EXPERT_RANKS, "k": 1, "min_capacity": 0}
        self.moe = deepspeed.moe.layer.MoE(8, expert, **sizes, use_rts=False)  # else which tokens drop out is random
        self.moe.deepspeed_moe.gate.wg.weight.data.normal_(generator=torch.Generator().manual_seed(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate_loss, _ = self.moe(self.inner(x))
        return hidden.square().mean() + gate_loss


class Run:
    """A DeepSpeed engine over ``Net``, fed with other inputs on every rank."""

    def __init__(self, stage: int, precision: str = "fp32", kind: str = "SoftSignum", soft_start: float = 0.5) -> None:
        self.net = Net()
        params = {"lr": on.LR, "weight_decay": on.DECAY, "total_steps": STEPS, "soft_start": soft_start}
        self.engine = deepspeed.initialize(
            model=self.net,
            model_parameters=[{"params": list(self.net.parameters()), "name": "all"}],
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": stage},
                "optimizer": {"type": kind, "params": params},
                **({} if precision == "fp32" else {precision: {"enabled": True}}),
            },
        )[0]

    @property
    def softsignum(self) -> SoftSignum:
        return self.engine.basic_optimizer

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
        x = torch.randn(32, 6, generator=generator).to(self.net.inner.weight.dtype)
        self.engine.backward(self.engine(x))
        self.engine.step()
        assert self.engine.was_step_applied()

    def everything(self) -> tuple[list[Tensor], tuple[Any, ...]]:
        """Masters and m of this rank, and the numbers of the schedule."""
        inner, held = self.softsignum, masters(self.engine.optimizer)
        state = [inner.state[master][EXP_AVG] for master in held]
        numbers = inner.schedule, inner.tau, *(group["steps_taken"] for group in inner.param_groups)
        return [x.detach().clone() for x in (*held, *state, *self.net.parameters())], numbers

    def whole_m(self) -> list[Tensor]:
        """Every m of the model once, gathered from all ranks."""
        mine: list[Tensor] = []
        for param in self.net.parameters():
            if self.engine.zero_optimization_stage():
                m = safe_get_full_optimizer_state(param, EXP_AVG)  # all ranks that share it come here
            else:
                m = self.softsignum.state[param][EXP_AVG]
            ranks = groups._get_expert_data_parallel_group(param.group_name) if is_moe_param(param) else None
            mine += [m.detach().clone()] if dist.get_rank(ranks) == 0 else []
        everywhere: list[list[Tensor]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everywhere, mine)
        return [m for rank in everywhere for m in rank]


def check_softsignum_counts_an_expert_as_often_as_a_dense_weight() -> None:
    """Experts are on other ranks than dense weights, and were refused. Median and deviation are those of all m's in one
    list, to the bit; saved in either phase, a run goes on to the bit. On four ranks two have the same experts."""
    for stage, precision in ((0, "fp32"), (1, "fp32"), (2, "bf16")):
        run, resumed = Run(stage, precision), []
        for step in range(STEPS):
            # 0.17.6 looks for the state of float32 at stage 0 in another file than it was saved to, of AdamW too.
            if step in (2, HARD + 2) and not (OLD and stage == 0):
                run.engine.save_checkpoint(str(folder := shared_folder()), tag="saved")
                resumed.append(Run(stage, precision))
                load(resumed[-1], folder)
            for each in (run, *resumed):
                each.step(step)
            if step == HARD:
                every = run.whole_m()
                assert sum(m.numel() for m in every) == 6 * 8 + 8 + 4 * 8 + 4 * (8 * 16 + 16 + 16 * 8 + 8)
                assert run.softsignum.schedule is not None
                assert run.softsignum.schedule[:2] == median_and_deviation(every), (stage, precision)
        tensors, numbers = run.everything()
        assert (numbers[0].first, numbers[0].length, {*numbers[2:]}) == (HARD, STEPS - HARD, {STEPS})
        for other in resumed:
            on.equal(other.everything()[0], tensors)
            assert other.everything()[1] == numbers


def check_softmuon_refuses_experts() -> None:
    refuses(lambda: Run(1, "bf16", kind="SoftMuon"), "experts", "soft_start 1")
