"""Runs under torchrun: transformers.Trainer and accelerate with S3 in DeepSpeed, on a tiny GPT-2 of random weights."""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DummyOptim
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from s3_megatron.engines.deepspeed import activity, decay_groups, register, use_gloo
from s3_megatron.optim import S3

CONFIGS = Path(__file__).parents[3] / "configs/deepspeed"
STEPS, LR, DECAY = 20, 3e-3, 0.01


class Counting(Dataset):
    """Sequences that count upwards: there is something to learn in 20 steps."""

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(16) + index) % 64
        return {"input_ids": tokens, "labels": tokens}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


class Watch(TrainerCallback):
    """Keeps the losses that Trainer logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: object, state: object, control: object, logs: dict | None = None, **_: object) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def with_trainer(config: Path, folder: Path) -> tuple[list[float], int]:
    """In float32: without a GPU, Trainer takes bf16 only with use_cpu, and with that it drops DeepSpeed silently."""
    watch = Watch()
    args = TrainingArguments(
        output_dir=str(folder),
        deepspeed=str(config),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=LR,
        weight_decay=DECAY,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(gpt2(), args, train_dataset=Counting(), callbacks=[watch])
    trainer.train()
    (group, *_) = trainer.deepspeed.basic_optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["p"]) == (LR, DECAY, 3), group
    return watch.losses, activity(trainer.deepspeed).steps


def with_accelerate(zero: dict, *, client: bool, clip: float) -> tuple[list[float], int]:
    """The plugin with S3 in its configuration, or with an S3 object, which accelerate swaps under offload."""
    config = {"zero_optimization": zero, "gradient_clipping": clip, "train_micro_batch_size_per_gpu": 4}
    if not client:
        config["optimizer"] = {"type": "S3", "params": {"lr": LR, "weight_decay": DECAY}}
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one, and a Trainer was here
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = gpt2()
    groups = decay_groups(model)
    optimizer = S3(groups, lr=LR, weight_decay=DECAY) if client else DummyOptim(groups)
    loader = DataLoader(Counting(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for step, batch in enumerate(loader):
        if step == STEPS:
            break
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, activity(model).steps


def largest_update(params: dict, **arguments: float) -> list:
    """The betas of S3 after a Trainer has filled in ``params``, and the largest |u| of some steps."""

    class Largest(TrainerCallback):
        seen = 0.0

        def on_train_begin(self, *_: object, **__: object) -> None:
            activity(trainer.model_wrapped).watch()

        def on_optimizer_step(self, *_: object, **__: object) -> None:
            self.seen = max(self.seen, float(activity(trainer.model_wrapped).statistics[1]))

    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "S3", "params": {"lr": "auto", "weight_decay": "auto", **params}},
    }
    with TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, deepspeed=config, max_steps=10, per_device_train_batch_size=4, learning_rate=LR,
            weight_decay=DECAY, lr_scheduler_type="constant", save_strategy="no", report_to=[], disable_tqdm=True,
            **arguments,
        )  # fmt: skip
        trainer = Trainer(gpt2(), args, train_dataset=Counting(), callbacks=[largest := Largest()])
        trainer.train()
    (group, *_) = trainer.deepspeed.basic_optimizer.param_groups
    return [*group["betas"], largest.seen]


def main() -> None:
    register()
    use_gloo()
    output, folder = Path(sys.argv[1]), Path(sys.argv[2])
    found = {f"trainer {name}": with_trainer(CONFIGS / f"{name}.json", folder) for name in ("zero1", "zero3")}
    betas = {
        "auto": largest_update({"betas": "auto"}),
        "set": largest_update({"betas": "auto"}, adam_beta1=0.9, adam_beta2=0.9),
        "pair": largest_update({"betas": [0.9, 0.99]}),
    }
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    for kind, clip in (("", 0.0), (" clipped", 1.0)):
        found[f"accelerate config{kind}"] = with_accelerate({"stage": 2}, client=False, clip=clip)
        found[f"accelerate object{kind}"] = with_accelerate(offload, client=True, clip=clip)
    if dist.get_rank() == 0:
        output.write_text(json.dumps(found))
        output.with_name("betas.json").write_text(json.dumps(betas))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
