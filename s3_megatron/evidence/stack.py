"""A stack: a GPT with a leading axis, along which every index is a training run of its own."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Model:
    """A pre-norm GPT: GPT-2's blocks and initial weights, tied embeddings, no dropout."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    length: int = 128  # tokens of a sequence
    qk_norm: bool = False
    vocabulary: int = 256  # bytes

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each weight of one member. A matrix maps rows: [inputs, outputs]."""
        d = self.width
        shapes: dict[str, tuple[int, ...]] = {"tokens": (self.vocabulary, d), "positions": (self.length, d)}
        for i in range(self.layers):
            for norm in ("norm1", "norm2"):
                shapes |= {f"{i}.{norm}.weight": (d,), f"{i}.{norm}.bias": (d,)}
            for name, (rows, columns) in {
                "qkv": (d, 3 * d),
                "project": (d, d),
                "up": (d, 4 * d),
                "down": (4 * d, d),
            }.items():
                shapes |= {f"{i}.{name}.weight": (rows, columns), f"{i}.{name}.bias": (columns,)}
        return shapes | {"norm.weight": (d,), "norm.bias": (d,)}

    def parameters(self) -> int:
        """Count the weights of one member."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def operations(self, tokens: int) -> float:
        """Count the floating-point operations of training on so many tokens: 6 a weight, and attention's."""
        return tokens * (
            6 * (self.parameters() - self.length * self.width) + 12 * self.layers * self.width * self.length
        )


def initial(model: Model, seed: int) -> dict[str, Tensor]:
    """Draw the weights of one member, float32 on the CPU: N(0, .02), residual branches divided by sqrt(2 layers)."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in model.shapes().items():
        if name.endswith("bias"):
            weights[name] = torch.zeros(shape)
        elif "norm" in name:
            weights[name] = torch.ones(shape)
        else:
            branch = name.endswith(("project.weight", "down.weight"))
            std = 0.02 / math.sqrt(2 * model.layers) if branch else 0.02
            weights[name] = torch.randn(shape, generator=generator) * std
    return weights


class Stack:
    """The weights of several members, [members, ...] each, and their losses."""

    def __init__(self, model: Model, seeds: list[int], device: str = "cpu") -> None:
        """Draw every member's weights from its own seed."""
        self.model = model
        self.members = len(seeds)
        drawn = {seed: initial(model, seed) for seed in set(seeds)}
        self.weights = {
            name: torch.stack([drawn[seed][name] for seed in seeds]).to(device).requires_grad_()
            for name in model.shapes()
        }

    def losses(self, tokens: Tensor, products: torch.dtype = torch.float32) -> Tensor:
        """Return each member's mean cross entropy in nats: float32 [members].

        ``tokens``: int64 [members, sequences, length + 1]; the last is a target alone. ``products``: the dtype of
        matrix products.
        """
        w, (members, sequences, _) = self.weights, tokens.shape
        model, d = self.model, self.model.width
        inputs, targets = tokens[:, :, :-1], tokens[:, :, 1:]
        own = torch.arange(members, device=tokens.device)[:, None, None] * model.vocabulary
        x = F.embedding(inputs + own, w["tokens"].flatten(0, 1)) + w["positions"][:, None]
        x = x.view(members, sequences * model.length, d)
        for i in range(model.layers):
            heads = self._linear(self._norm(x, f"{i}.norm1"), f"{i}.qkv", products)
            heads = heads.view(members * sequences, model.length, 3, model.heads, d // model.heads)
            q, k, v = heads.permute(2, 0, 3, 1, 4)
            if model.qk_norm:
                q, k = (F.layer_norm(y, y.shape[-1:]) for y in (q, k))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            x = x + self._linear(mixed.reshape(x.shape), f"{i}.project", products)
            up = self._linear(self._norm(x, f"{i}.norm2"), f"{i}.up", products)
            x = x + self._linear(F.gelu(up, approximate="tanh"), f"{i}.down", products)
        logits = torch.bmm(self._norm(x, "norm").to(products), w["tokens"].transpose(1, 2).to(products)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(members, -1).mean(1)

    def _linear(self, x: Tensor, name: str, products: torch.dtype) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return torch.baddbmm(bias[:, None].to(products), x.to(products), weight.to(products))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        w = self.weights
        return F.layer_norm(x, x.shape[-1:]) * w[f"{name}.weight"][:, None] + w[f"{name}.bias"][:, None]
