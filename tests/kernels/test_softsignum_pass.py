"""What a SoftSignum step does besides the update, on every kernel of the CPU: factor, flag, models, statistics."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from s3_megatron.kernels.cpu import library
from s3_megatron.kernels.op import choose
from tests.kernels.by_keyword import cpu, foreach, softsignum_step_
from tests.tensors import bits, random

INF = math.inf
HYPER = {"lr": 0.1, "beta": 0.9, "weight_decay": 0.1, "nesterov": True}
WIDE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
KERNELS: dict[str, Callable[..., None]] = {"foreach": foreach.softsignum_step_}
KERNELS |= {name: partial(cpu.softsignum_step_, loop=loop) for loop, name in enumerate(library.loops())}

pytestmark = [pytest.mark.parametrize("kernel", KERNELS), pytest.mark.parametrize("tau", [INF, 5.0])]


def problem(size: int, dtypes: tuple[torch.dtype, ...] = (WIDE, WIDE, WIDE)) -> list[list[Tensor]]:
    """Weights, gradients of which some are broken, and m."""
    columns = [[random(size, seed=seed, dtype=dtype)] for seed, dtype in enumerate(dtypes)]
    columns[1][0][5::17], columns[1][0][7::17] = math.nan, -INF
    return columns


def copies(columns: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[x.clone() for x in column] for column in columns]


def same(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    return all(
        torch.equal(bits(a), bits(b)) for xs, ys in zip(one, other, strict=True) for a, b in zip(xs, ys, strict=True)
    )


def test_a_factor_is_a_multiplication_of_the_gradient(kernel: str, tau: float) -> None:
    """As the host's own pass makes it, to the bit, by a number that is no power of two; maximize is its sign."""
    for size in (1, 17, 4097):
        one, other = problem(size), problem(size)
        factor = torch.tensor([0.3])
        other[1][0] *= factor
        KERNELS[kernel](*one, **HYPER, tau=tau, scale=factor)
        KERNELS[kernel](*other, **HYPER, tau=tau)
        assert same([one[0], one[2]], [other[0], other[2]])
        other[1][0] *= -1.0
        KERNELS[kernel](*one, **HYPER, tau=tau, scale=factor.reshape(()))
        KERNELS[kernel](*other, **HYPER, tau=tau, maximize=True)
        assert same([one[0], one[2]], [other[0], other[2]])


def test_models_weights_are_the_new_ones_rounded_once(kernel: str, tau: float) -> None:
    """A row has no r: what is written beside it must be the model's weight. No bit of the rest changes, and a broken
    coordinate's model weight is its master's."""
    for size, grad, state, model in itertools.product((1, 63, 1027), (WIDE, BRAIN), (WIDE, BRAIN), (BRAIN, HALF)):
        with_models, without = (problem(size, (WIDE, grad, state)) for _ in range(2))
        models = [torch.full((size,), 7.0, dtype=model)]
        KERNELS[kernel](*with_models, **HYPER, tau=tau, model_params=models)
        KERNELS[kernel](*without, **HYPER, tau=tau)
        assert same(with_models, without)
        assert torch.equal(models[0], with_models[0][0].to(model))


def test_found_inf_makes_the_step_do_nothing(kernel: str, tau: float) -> None:
    """Not a bit, that of a negative zero neither."""
    columns, models = problem(1027), [torch.full((1027,), 7.0, dtype=BRAIN)]
    columns[0][0][:9] = columns[2][0][:9] = -0.0
    before, statistics = copies([*columns, models]), torch.zeros(5, dtype=torch.float64)
    rest = {**HYPER, "tau": tau, "model_params": models, "statistics": statistics}
    for value in (1.0, math.nan):
        KERNELS[kernel](*columns, **rest, found_inf=torch.tensor([value]))
        assert same([*columns, models], before) and not statistics.any()
    KERNELS[kernel](*columns, **rest, found_inf=torch.zeros(1))
    changed = [not same([now], [then]) for now, then in zip([*columns, models], before, strict=True)]
    assert changed == [True, False, True, True] and statistics[4] == 1027


def test_statistics_are_those_of_the_update(kernel: str, tau: float) -> None:
    """And counting changes no bit. Sums of 1,024 float32 numbers at a time: half a unit each."""
    for size, grad in itertools.product((1, 63, 1024, 10_007), (WIDE, BRAIN)):
        columns = problem(size, (WIDE, grad, WIDE))
        columns[0] = [torch.zeros(size)]  # so that the new weight is the update
        plain, statistics = copies(columns), torch.ones(5, dtype=torch.float64) / 8
        KERNELS[kernel](*columns, **{**HYPER, "lr": 1.0}, tau=tau, statistics=statistics)
        KERNELS[kernel](*plain, **{**HYPER, "lr": 1.0}, tau=tau)
        assert same(columns, plain)
        u, g = columns[0][0].double().abs(), columns[1][0]
        agreeing = (columns[0][0].sign() * g.sign() < 0).sum()
        expected = torch.stack([u.sum(), u.max(), (u > 0.9).sum(), agreeing, torch.tensor(size)]).double() + 1 / 8
        expected[1] -= 1 / 8
        torch.testing.assert_close(statistics, expected, rtol=2**-18, atol=0)


def test_several_rows_share_one_call(kernel: str, tau: float) -> None:
    """Empty ones, transposed ones, and those that begin at an odd element, with model weights, as one at a time."""

    def rows() -> list[list[Tensor]]:
        columns = [[] for _ in range(4)]
        for size in (0, 1, 64, 1027):
            x, g, m = (column[0] for column in problem(size + 1))
            for column, t in zip(columns, (x, g, m, torch.zeros(size + 1, dtype=BRAIN)), strict=True):
                column += [t[1:]] if size != 64 else [t[:-1].view(8, 8).t()]
        return columns

    (*together, models), apart = rows(), rows()
    KERNELS[kernel](*together, **HYPER, tau=tau, model_params=models)
    for x, g, m, model in zip(*apart, strict=True):
        KERNELS[kernel]([x], [g], [m], **HYPER, tau=tau, model_params=[model])
    assert same([*together, models], apart)


def test_what_runs_by_itself_is_the_kernel_of_this_cpu(kernel: str, tau: float) -> None:
    choose.cache_clear()
    one, other = problem(1027), problem(1027)
    implementation = "foreach" if kernel == "foreach" else "cpu"
    softsignum_step_(*one, **HYPER, tau=tau, implementation=implementation)
    KERNELS["foreach" if kernel == "foreach" else library.loops()[0]](*other, **HYPER, tau=tau)
    assert same(one, other)
