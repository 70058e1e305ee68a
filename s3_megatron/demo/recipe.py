"""From a configuration to the command line of a training run."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from s3_megatron.errors import S3Error

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Engine:
    """What trains: its entry, the flags that are its own, what it is called in a title, and whose versions count."""

    entry: str
    flags: tuple[str, ...]
    title: str
    packages: tuple[str, ...]
    results: str  # folder under runs/


ENGINES = {
    "megatron": Engine(
        entry="s3_megatron.train.pretrain_gpt",
        flags=("--use-distributed-optimizer", "--ckpt-format", "torch_dist"),
        title="Megatron's distributed optimizer",
        packages=("torch", "megatron-core"),
        results="demo",
    ),
    "deepspeed": Engine(
        entry="s3_megatron.train.pretrain_gpt_deepspeed",
        flags=("--deepspeed-config", str(ROOT / "configs/deepspeed/zero1.json")),
        title="DeepSpeed's ZeRO 1",
        packages=("torch", "megatron-core", "deepspeed"),
        results="demo-deepspeed",
    ),
}

# What Megatron needs where neither Transformer Engine nor Apex is installed; the rehearsal adds its own.
WITHOUT_ACCELERATIONS = [
    *("--transformer-impl", "local"),
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-rope-fusion",
]


def load(path: Path) -> dict[str, Any]:
    """Read a YAML configuration as plain dictionaries."""
    config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def engine(config: Mapping[str, Any]) -> Engine:
    """Give the engine that ``config`` chooses; raises S3Error where there is none of that name."""
    name = config["engine"]
    if name not in ENGINES:
        raise S3Error(f"engine is {name!r}: it must be one of {', '.join(sorted(ENGINES))}")
    return ENGINES[name]


def s3_rates(optimizer: Mapping[str, Any]) -> tuple[float, float]:
    """S3's peak rate and weight decay from AdamW's, by the paper's rule (SPEC section 1).

    The decay that one step applies, rate times decay, is the same for both.
    """
    adamw, ratio = optimizer["adamw"], optimizer["s3"]["lr_ratio"]
    lr = adamw["lr"] * ratio
    decay = adamw["lr"] * adamw["weight_decay"] / lr
    return float(f"{lr:.12g}"), float(f"{decay:.12g}")  # a person reads 0.003, not 0.0029999999999999996


def optimizer_flags(name: str, optimizer: Mapping[str, Any]) -> list[str]:
    """Megatron's flags for ``name``, "s3" or "adam", from the configuration's section ``optimizer``."""
    if name == "adam":
        lr, decay = optimizer["adamw"]["lr"], optimizer["adamw"]["weight_decay"]
        beta1, beta2 = optimizer["adamw"]["betas"]
        own = {"adam_beta1": beta1, "adam_beta2": beta2}
    else:
        lr, decay = s3_rates(optimizer)
        own = {"s3_beta": optimizer["s3"]["beta"], "s3_p": optimizer["s3"]["p"]}
    rates = {"lr": lr, "min_lr": lr / 10, "weight_decay": decay}
    return ["--optimizer", name, *flags({**rates, **own})]


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Spell settings as flags: ``num_layers: 4`` is ``--num-layers 4``."""
    return [
        word
        for key, value in settings.items()
        for word in (f"--{key.replace('_', '-')}", f"{value:.12g}" if isinstance(value, float) else str(value))
    ]


def torchrun(ranks: int, entry: str, entry_flags: list[str]) -> list[str]:
    """The command that runs ``entry`` on ``ranks`` processes of this machine; it picks a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, "-m", entry, *entry_flags]
