"""What is equal for all, by docs/evidence.md: decay, schedule, text, model, and when a run counts as diverged."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from s3_megatron.evidence import contenders, text, training
from s3_megatron.evidence.cells import Cell
from s3_megatron.evidence.contenders import CONTENDERS
from s3_megatron.evidence.experiments import Setup
from s3_megatron.evidence.stack import Model, Stack
from s3_megatron.evidence.training import train


@pytest.mark.parametrize("name", CONTENDERS)
def test_weight_decay_is_apart_from_the_update_and_of_matrices_alone(name):
    """Three steps of the same gradients with and without decay: the weights differ by the rate times it, a step.

    A decay that is added to the gradient, as pytorch-optimizer's ADOPT and AdEMAMix and torch's NAdam do by default, is
    normalized away. SOAP's first step moves nothing, and Schedule-Free averages: two thirds of three steps and more.
    """
    rate, decay, generator = 1e-3, 0.1, torch.Generator().manual_seed(0)
    # Muon's own matrix, one that AdamW moves beside it, and what has no decay.
    shapes = {"0.up.weight": (16, 8), "tokens": (16, 8), "norm.bias": (8,)}
    first = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    grads = [{key: torch.randn(w.shape, generator=generator) for key, w in first.items()} for _ in range(3)]

    def trained(decay):
        weights = {key: torch.nn.Parameter(w.clone()) for key, w in first.items()}
        length = {"total_steps": 10} if CONTENDERS[name].takes_length else {}
        optimizers = contenders.build(name, weights, rate, decay, length)
        for step in grads:
            for key, weight in weights.items():
                weight.grad = step[key].clone()
            for optimizer in optimizers:
                optimizer.step()
        return {key: weight.detach() for key, weight in weights.items()}

    with_decay, without = trained(decay), trained(0.0)
    for key in ("0.up.weight", "tokens"):
        moved = (without[key] - with_decay[key]) / (rate * decay * first[key])
        large = first[key].abs() > 0.3  # where rounding of the weights is below a hundredth of it
        assert 1.9 < moved[large].min() and moved[large].max() < 3.1
    assert torch.equal(without["norm.bias"], with_decay["norm.bias"])
    assert not torch.equal(without["norm.bias"], first["norm.bias"]), "it did not move at all"


def test_the_schedule_by_hand():
    """Warm-up over 5% of 200 steps, then a cosine that has come down by half in the middle, and to 0 at the end."""
    setup = Setup(steps=200)
    factors = [setup.rate_factor(step) for step in range(200)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[10] == 1 and factors[105] == pytest.approx(0.5) and 0 < factors[-1] < 1e-4
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert [replace(setup, schedule="constant").rate_factor(step) for step in (10, 199)] == [1.0, 1.0]


def test_schedule_free_has_the_warm_up_alone_and_is_judged_by_its_average(setup, corpus, monkeypatch):
    """With a rate that falls, or the weights at which it takes gradients, its rank would be another optimizer's."""
    cosine, constant = (
        Cell("it", "schedule-free", "base", replace(setup, schedule=schedule), 4e-3, "{}", 1, "text")
        for schedule in ("cosine", "constant")
    )
    (falling,), (flat,) = (train([cell], corpus) for cell in (cosine, constant))
    assert falling["trained"] == flat["trained"]
    monkeypatch.setattr("schedulefree.AdamWScheduleFree.eval", lambda self: None)
    (at_gradients,) = train([cosine], corpus)
    assert at_gradients["losses"] == falling["losses"] and at_gradients["validation"] != falling["validation"]


def test_validation_text_is_never_trained_on():
    """Blocks are numbered by their bytes: every fortieth is for validation, and a seed's order reads of the others."""
    data = b"".join(bytes([number]) * text.BLOCK for number in range(80))
    corpus = text.cut(data)
    assert set(corpus.validation.tolist()) == {39, 79} and set(corpus.train.tolist()) == set(range(80)) - {39, 79}
    starts = text.order(corpus, seed=1, steps=50, batch=8, length=128)
    read = text.windows(corpus.train, starts, 129)
    assert read.shape == (50, 8, 129) and not {39, 79} & set(read.unique().tolist())
    assert len(text.validation_starts(corpus, 4096, 129)) == 4096 // 129


def test_a_validation_loss_is_the_mean_over_all_sequences_however_many_are_taken_at_once(setup, corpus, monkeypatch):
    """It is the number that ranks: a part that is not full must not count as a full one. To 1e-6, float32's sums."""
    stack = Stack(setup.model, [1, 2])
    starts = text.validation_starts(corpus, setup.validation, setup.length + 1)
    losses = stack.losses(text.windows(corpus.validation, starts, setup.length + 1).expand(2, -1, -1))
    for at_once in (64, 7):
        monkeypatch.setattr(training, "VALIDATION_SEQUENCES", at_once)
        assert len(starts) % at_once, "the last part is a smaller one"
        found = training.validate(stack, corpus, setup, lambda step: True)
        assert found == pytest.approx(losses.tolist(), rel=1e-6)


def test_qk_norm_makes_the_scale_of_queries_and_keys_count_for_nothing():
    """Three times the weights of both: other losses without it, the same with it, to rounding."""
    tokens = torch.randint(0, 256, (2, 4, 17), generator=torch.Generator().manual_seed(0))
    losses = {}
    for qk_norm in (False, True):
        for factor in (1, 3):
            stack = Stack(Model(layers=1, width=32, heads=2, length=16, qk_norm=qk_norm), [1, 2])
            with torch.no_grad():
                stack.weights["0.qkv.weight"].mul_(10)  # initial ones are too small for attention to matter
                stack.weights["0.qkv.weight"][..., :64].mul_(factor)
                losses[qk_norm, factor] = stack.losses(tokens)
    assert torch.allclose(losses[True, 1], losses[True, 3], atol=1e-5)
    assert not torch.allclose(losses[False, 1], losses[False, 3], atol=1e-4)


def test_products_in_bfloat16_leave_weights_and_losses_in_float32(setup, corpus):
    """As table2 trains on a GPU. 20 steps differ by roundings of 2^-8, and by no more than 1e-2 of the loss."""
    cell = Cell("it", "s3", "base", setup, 4e-3, "{}", 1, "text")
    (exact,), (rounded,) = (
        train([replace(cell, setup=s)], corpus) for s in (setup, replace(setup, products="bfloat16"))
    )
    assert rounded["losses"] != exact["losses"] and rounded["losses"] == pytest.approx(exact["losses"], rel=1e-2)
    stack = Stack(setup.model, [1])
    loss = stack.losses(torch.zeros(1, 1, setup.length + 1, dtype=torch.long), torch.bfloat16)
    assert {loss.dtype, *(w.dtype for w in stack.weights.values())} == {torch.float32}


@pytest.mark.parametrize("loss", [math.nan, math.inf, math.log(256) + 1.001])
def test_a_run_diverges_at_its_first_loss_that_is_no_number_or_above_ln_256_plus_1(loss):
    setup = Setup(steps=400)
    fine = [math.log(256) + 0.999] * 400
    assert training._curve(fine, setup)["diverged"] is None
    curve = training._curve([*fine[:250], loss, *fine[251:]], setup)
    assert curve["diverged"] == 250 and len(curve["losses"]) == 200, "thinned to 200 points, and found before"
    assert training._thin([1.0, 2.0, 4.0], 2) == [1.5, 4.0], "the last point is a mean of those that are left"


def test_a_result_has_all_that_a_figure_is_traced_by(setup, corpus):
    (result,) = train([Cell("it", "adamw", "base", setup, 4e-3, "{}", 1, "text")], corpus)
    described = {"key", "contender", "optimizer", "setup", "rate", "settings", "seed"}
    seen = {"every", "losses", "spikes", "diverged", "norms", "update_mean", "update_max", "validation"}
    assert set(result) >= described | seen | {"seconds", "stack", "weights", "order", "trained"}
    assert len(result["update_max"]) == setup.steps / setup.watch_every and len(result["norms"]) == setup.steps
    json.dumps(result)
