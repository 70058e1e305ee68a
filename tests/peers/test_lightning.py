"""S3 in Lightning's Trainer: trained, saved, resumed; lightning is installed by ``make test-peers`` alone."""

from pathlib import Path

import pytest
import torch

from s3_megatron.errors import S3Error
from s3_megatron.optim import S3

pytestmark = pytest.mark.peers


def train(folder: Path, kind: type, steps: int, resume: Path | None = None) -> dict[str, torch.Tensor]:
    """Train to step ``steps``, from a checkpoint if one is given; returns the weights."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(5, 3)

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            del index
            return self.linear(batch[0]).square().mean()

        def configure_optimizers(self) -> dict[str, object]:
            optimizer = kind(self.parameters(), lr=1e-2, weight_decay=0.1)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = Module()
    # Batches alike: in a resumed epoch Lightning begins with the first again, under any optimizer.
    data = torch.utils.data.TensorDataset(torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).repeat(6, 1))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=0.05,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2), ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{kind.__name__}-{steps}.ckpt")
    return module.state_dict()


def test_a_run_that_resumes_ends_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    """To the bit: clipping, schedule and state are all in what Lightning saves."""
    whole = train(tmp_path, S3, 12)
    train(tmp_path, S3, 4)
    resumed = train(tmp_path, S3, 12, resume=tmp_path / "S3-4.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_checkpoint_of_adamws_is_refused(tmp_path: Path) -> None:
    train(tmp_path, torch.optim.AdamW, 6)
    with pytest.raises(S3Error, match=r"was not written by S3.*from_adam_state"):
        train(tmp_path, S3, 12, resume=tmp_path / "AdamW-6.ckpt")
