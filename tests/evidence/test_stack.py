"""What a stack trains: a GPT, held against torch's own modules."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from s3_megatron.evidence.stack import Model, Stack, initial

MODEL = Model(layers=2, width=32, heads=4, length=16)
# A block's weights by torch's names, whose matrices are [outputs, inputs].
NAMES = [
    *(("self_attn.in_proj_", "qkv"), ("self_attn.out_proj.", "project"), ("linear1.", "up"), ("linear2.", "down")),
    *(("norm1.", "norm1"), ("norm2.", "norm2")),
]


def plain_loss(model: Model, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The mean loss of one member, by torch's own layers."""
    x = weights["tokens"][tokens[:, :-1]] + weights["positions"]
    for i in range(model.layers):
        layer = nn.TransformerEncoderLayer(
            *(model.width, model.heads, 4 * model.width, 0.0),
            *(lambda y: F.gelu(y, approximate="tanh"), 1e-5, True, True),
        )
        kinds = itertools.product(NAMES, ("weight", "bias"))
        own = {f"{theirs}{kind}": weights[f"{i}.{name}.{kind}"] for (theirs, name), kind in kinds}
        layer.load_state_dict({name: w.T if w.ndim == 2 else w for name, w in own.items()})
        x = layer(x, nn.Transformer.generate_square_subsequent_mask(model.length), is_causal=True)
    x = F.layer_norm(x, x.shape[-1:], weights["norm.weight"], weights["norm.bias"])
    return F.cross_entropy((x @ weights["tokens"].T).flatten(0, 1), tokens[:, 1:].flatten())


def test_a_members_loss_is_that_of_torchs_own_layers():
    """A model that sees the byte it is to say, or says the one that it sees, ranks optimizers by another task.

    Weights are ten times the initial ones and drawn for biases and norms, too, or attention hardly counts: without the
    mask the losses differ by more than .01; by 1e-5, the rounding of sums in another order, with it.
    """
    stack, generator = Stack(MODEL, [1, 2]), torch.Generator().manual_seed(0)
    tokens = torch.randint(0, MODEL.vocabulary, (2, 4, MODEL.length + 1), generator=generator)
    with torch.no_grad():
        for w in stack.weights.values():
            w.mul_(10 if w.ndim == 3 else 1).add_(0.1 * torch.randn(w.shape, generator=generator) * (w.ndim == 2))
    losses = stack.losses(tokens)
    for i, loss in enumerate(losses):
        member = {name: w[i].detach() for name, w in stack.weights.items()}
        assert abs(loss - plain_loss(MODEL, member, tokens[i])) < 1e-5


def test_initial_weights_are_gpt_2s():
    """Twice as wide a residual branch, or a vocabulary of .2, is another model than the one docs/evidence.md names."""
    weights = initial(Model(), 0)
    for name, w in weights.items():
        if w.ndim == 1:
            assert torch.equal(w, torch.full_like(w, float("norm" in name and name.endswith("weight"))))
            continue
        std = 0.02 / math.sqrt(8) if name.split(".")[1:2] in (["project"], ["down"]) else 0.02
        # Of 16,384 numbers at the least: their standard deviation is right to .6%, five of which are 3%.
        assert abs(w.std() / std - 1) < 0.03 and abs(w.mean()) < 0.05 * std, name
