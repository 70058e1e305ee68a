"""S3 in accelerate without an engine: prepared, saved, resumed; DeepSpeed's is in tests/engines."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from s3_megatron.errors import S3Error
from s3_megatron.optim import EXP_AVG, EXP_AVG_ROOT, S3


class Run:
    """A small model with its optimizer and schedule, two batches a step."""

    def __init__(self, kind: type = S3) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = torch.nn.Linear(5, 3)
        optimizer = kind(model.parameters(), lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)

    def train(self, steps: range) -> None:
        for step in steps:
            with self.accelerator.accumulate(self.model):
                x = torch.randn(2, 5, generator=torch.Generator().manual_seed(step))
                self.accelerator.backward(self.model(x).square().mean())
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.05)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()

    def tensors(self) -> list[torch.Tensor]:
        weights = list(self.model.parameters())
        state = self.optimizer.state
        return [*weights, *(state[x][name] for x in weights for name in (EXP_AVG, EXP_AVG_ROOT))]


def test_save_state_and_load_state_go_on_to_the_bit(tmp_path: Path) -> None:
    whole = Run()
    whole.train(range(6))
    whole.accelerator.save_state(str(tmp_path))
    whole.train(range(6, 12))
    resumed = Run()
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(range(6, 12))
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), resumed.tensors(), strict=True))
    assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"] < 1e-2


def test_adamws_state_is_refused_and_the_optimizer_left_as_it_was(tmp_path: Path) -> None:
    adam = Run(torch.optim.AdamW)
    adam.train(range(2))
    adam.accelerator.save_state(str(tmp_path))
    run = Run()
    run.train(range(2))
    before = [t.clone() for t in run.tensors()[2:]]
    with pytest.raises(S3Error, match="was not written by S3"):
        run.accelerator.load_state(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(run.tensors()[2:], before, strict=True))
