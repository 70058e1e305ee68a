"""The optimizers that are compared: ours, and others' from libraries that are kept; none is written here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.optim import S3, SoftMuon, SoftSignum

type Weights = dict[str, Tensor]
# Weights by name, peak rate, weight decay and settings in; optimizers out, which together move every weight.
type Make = Callable[..., list[torch.optim.Optimizer]]


@dataclass(frozen=True)
class Contender:
    """An optimizer by what it is built from.

    ``stacked`` says that it is element-wise: members along a leading axis do not meet. Others get every member's
    weights by themselves. ``own_schedule`` takes the warm-up and no decay of the rate. ``takes_length`` gets the run's
    steps as the setting ``total_steps``.
    """

    make: Make
    settings: tuple[str, ...]
    stacked: bool = True
    own_schedule: bool = False
    takes_length: bool = False


def is_decayed(name: str) -> bool:
    """Whether weight decay is on the weight of this name: matrices and embeddings."""
    return "norm" not in name and not name.endswith("bias")


def groups(weights: Weights, decay: float) -> list[dict[str, Any]]:
    """Make the two param groups: with weight decay and without."""
    decayed = [weight for name, weight in weights.items() if is_decayed(name)]
    plain = [weight for name, weight in weights.items() if not is_decayed(name)]
    return [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]


class ClippedAdamW(torch.optim.AdamW):
    """torch's AdamW whose update, the decay left out, is clipped to [-1, 1] in units of the rate."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take AdamW's step, and take back what of it is longer than the rate (modifies the weights)."""
        before = [[x.detach().clone() for x in group["params"]] for group in self.param_groups]
        super().step(closure)
        for group, olds in zip(self.param_groups, before, strict=True):
            lr = group["lr"]
            for x, old in zip(group["params"], olds, strict=True):
                kept = old.mul_(1 - lr * group["weight_decay"])
                x.copy_(kept + (x - kept).clamp_(-lr, lr))


def _torch(kind: type[torch.optim.Optimizer], **fixed: Any) -> Make:
    def make(weights: Weights, rate: float, decay: float, **settings: Any) -> list[torch.optim.Optimizer]:
        return [kind(groups(weights, decay), lr=rate, **_tuples(settings), **fixed)]  # type: ignore[call-arg]

    return make


def _library(name: str, **fixed: Any) -> Make:
    """Take the optimizer of this name from pytorch-optimizer."""

    def make(weights: Weights, rate: float, decay: float, **settings: Any) -> list[torch.optim.Optimizer]:
        try:
            import pytorch_optimizer
        except ImportError as error:
            raise S3Error(f"{name} is pytorch-optimizer's ({error}): pip install 's3-megatron[evidence]'") from None
        kind = getattr(pytorch_optimizer, name)
        return [kind(groups(weights, decay), lr=rate, **_tuples(settings), **fixed)]

    return make


def _s3(weights: Weights, rate: float, decay: float, **settings: Any) -> list[torch.optim.Optimizer]:
    if "state_dtype" in settings:
        settings["state_dtype"] = getattr(torch, settings["state_dtype"])
    return [S3(groups(weights, decay), lr=rate, **_tuples(settings))]


def _schedule_free(weights: Weights, rate: float, decay: float, **settings: Any) -> list[torch.optim.Optimizer]:
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise S3Error(f"schedulefree is not installed ({error}): pip install 's3-megatron[evidence]'") from None
    optimizer = AdamWScheduleFree(groups(weights, decay), lr=rate, **_tuples(settings))
    optimizer.train()
    return [optimizer]


def _muon(weights: Weights, rate: float, decay: float, **settings: Any) -> list[torch.optim.Optimizer]:
    """torch's Muon for the blocks' matrices, AdamW at the same rate for the rest.

    ``match_rms_adamw`` makes that one rate fit both; it also takes matrices by either side first, as ours.
    """
    matrices, rest = _parted(weights)
    muon = torch.optim.Muon(matrices.values(), lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw", **settings)
    return [muon, _beside_muon(rest, rate, decay)]


def _softmuon(weights: Weights, rate: float, decay: float, **settings: Any) -> list[torch.optim.Optimizer]:
    """SoftMuon in the place of torch's Muon: its hard steps are that one's by default, and all else is as there."""
    matrices, rest = _parted(weights)
    softmuon = SoftMuon(matrices.values(), rate, weight_decay=decay, **{"coefficient_type": "simple"} | settings)
    return [softmuon, _beside_muon(rest, rate, decay)]


def _parted(weights: Weights) -> tuple[Weights, Weights]:
    """Part weights into the blocks' matrices and the rest."""
    matrices = {name: w for name, w in weights.items() if "." in name and is_decayed(name)}
    return matrices, {name: w for name, w in weights.items() if name not in matrices}


def _beside_muon(rest: Weights, rate: float, decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(rest, decay), lr=rate, betas=(0.9, 0.95), fused=True)


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """YAML's lists as optimizers take them."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


# Flags that a fair comparison needs: decay is decoupled everywhere, and clipping is done before, once for all.
CONTENDERS = {
    "s3": Contender(_s3, ("beta", "betas", "p", "nesterov", "state_dtype")),
    # Its noise goes by an element's number in the call, so a member has an optimizer of its own.
    "s3-stochastic": Contender(
        lambda *given, **settings: _s3(*given, **settings, state_dtype="bfloat16"),
        ("beta", "betas", "p", "nesterov", "rounding_seed"),
        stacked=False,
    ),
    "adamw": Contender(_torch(torch.optim.AdamW, fused=True), ("betas", "eps")),
    "adamw-clipped": Contender(_torch(ClippedAdamW, fused=True), ("betas", "eps")),
    "nadam": Contender(_torch(torch.optim.NAdam, decoupled_weight_decay=True), ("betas", "momentum_decay")),
    "adafactor": Contender(_torch(torch.optim.Adafactor), ("beta2_decay", "d"), stacked=False),
    "muon": Contender(_muon, ("momentum", "nesterov"), stacked=False),
    "softmuon": Contender(
        _softmuon,
        ("beta", "nesterov", "soft_start", "eps", "tmax", "coefficient_type"),
        stacked=False,
        takes_length=True,
    ),
    "lion": Contender(_library("Lion"), ("betas",)),
    "signum": Contender(_library("SignSGD"), ("momentum",)),
    # Its temperature is over all that an optimizer moves, so a member has one of its own.
    "softsignum": Contender(
        _torch(SoftSignum), ("beta", "nesterov", "soft_start", "eps", "tmax"), stacked=False, takes_length=True
    ),
    "adan": Contender(_library("Adan", weight_decouple=True), ("betas",)),
    "ademamix": Contender(_library("AdEMAMix", weight_decouple=True), ("betas", "alpha", "t_alpha_beta3")),
    "adopt": Contender(_library("ADOPT", weight_decouple=True), ("betas",)),
    "mars": Contender(_library("MARS", optimize_1d=True), ("betas", "gamma"), stacked=False),
    "soap": Contender(_library("SOAP"), ("betas", "precondition_frequency"), stacked=False),
    "stable-adamw": Contender(_library("StableAdamW"), ("betas",), stacked=False),
    "schedule-free": Contender(_schedule_free, ("betas",), own_schedule=True),
}


def build(
    name: str, weights: Weights, rate: float, decay: float, settings: dict[str, Any]
) -> list[torch.optim.Optimizer]:
    """Build a contender over weights: of several members stacked, or of one where members must not meet."""
    return CONTENDERS[name].make(weights, rate, decay, **settings)
