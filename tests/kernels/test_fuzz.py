"""Lists of tensors as no caller should make them: a step moves them as algorithm 1 says or refuses them, and touches
nothing else. `make sanitize` runs it with a kernel that ends at the first byte out of place."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from s3_megatron.errors import S3Error
from tests.kernels.by_keyword import cpu, foreach, step_

HYPER = {"beta1": 0.95, "beta2": 0.95, "p": 3.0, "weight_decay": 0.1, "nesterov": True, "maximize": False}
GUARD = 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# Ways to lay a tensor out in memory; each gets values of the shape wanted, and a block of memory around it to watch.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "reversed dimensions": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous(),
    "every other": lambda x: torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0],
    "within a larger one": lambda x: torch.cat([x.new_zeros(GUARD), x.flatten(), x.new_zeros(GUARD)])[
        GUARD:-GUARD
    ].view(x.shape),
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "negative bit": lambda x: torch._neg_view(-x),
    "expanded": lambda x: x.flatten()[:1].expand(x.shape) if x.numel() > 1 else x,
    "sliding": lambda x: torch.arange(9.0).to(x.dtype).as_strided((3, 3), (2, 1)) if x.shape == (3, 3) else x,
}
# What does not fit its row.
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "shorter": lambda x: x.flatten()[: x.numel() // 2],
    "longer": lambda x: torch.cat([x.flatten(), x.flatten()]),
    "flattened": lambda x: x.flatten(),
    "on meta": lambda x: x.to("meta"),
    "complex": lambda x: x.to(torch.complex64),
    "integer": lambda x: x.to(torch.int32),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "sparse": lambda x: x.to_sparse(),
    "resized to nothing": lambda x: _resized(x.clone(), 0),
    "resized": lambda x: _resized(x.clone(), max(0, x.numel() * x.element_size() - 4)),
}
SHAPES = st.sampled_from([(), (1,), (0,), (3, 0), (5,), (3, 3), (2, 3, 4, 5), (257,), (4099,)])


def _resized(x: Tensor, size: int) -> Tensor:
    x.untyped_storage().resize_(size)
    return x


@st.composite
def lists(draw: st.DrawFn) -> list[list[Tensor]]:
    """Four or five columns of one to four rows, most of which fit."""
    columns: list[list[Tensor]] = [[] for _ in range(draw(st.sampled_from([4, 4, 5])))]
    usual = [draw(st.sampled_from(DTYPES[:3])), draw(st.sampled_from(DTYPES[:3])), draw(st.sampled_from(DTYPES[:2]))]
    usual += [usual[2], torch.bfloat16]
    torch.manual_seed(draw(st.integers(0, 9)))
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(SHAPES)
        for kind, column in enumerate(columns):
            dtype = draw(st.sampled_from([*[usual[kind]] * 8, *DTYPES]))
            x = torch.rand(shape).to(dtype)
            layout = draw(st.sampled_from([*["contiguous"] * 4, *LAYOUTS]))
            # torch 2.13 loses the sign where it copies such a float16 weight, under AdamW too.
            if layout != "negative bit" or dtype != torch.float16 or kind == 1:
                x = LAYOUTS[layout](x)
            if draw(st.integers(0, 20)) == 0:
                x = WRONG[draw(st.sampled_from(sorted(WRONG)))](x)
            column.append(x)
    if draw(st.integers(0, 9)) == 0:  # one tensor twice, or a part of it
        source, target = draw(st.sampled_from(columns)), draw(st.sampled_from(columns))
        target[-1] = source[0] if draw(st.booleans()) else source[0].flatten()[1:] if source[0].numel() else source[0]
    if draw(st.integers(0, 9)) == 0:
        draw(st.sampled_from(columns)).pop()
    return columns


def values(columns: list[list[Tensor]]) -> list[list[Tensor]]:
    return [
        [x.detach().resolve_neg().clone(memory_format=torch.contiguous_format) for x in column] for column in columns
    ]


def same(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def readable(columns: list[list[Tensor]]) -> bool:
    return all(
        x.layout is torch.strided
        and not x.is_meta
        and (x.storage_offset() + x.numel()) * x.element_size() <= x.untyped_storage().nbytes()
        for column in columns
        for x in column
    )


@settings(max_examples=400, derandomize=True, suppress_health_check=list(HealthCheck))
@given(lists(), st.sampled_from(["auto", "cpu", "op", "kernel"]))
def test_a_step_moves_what_fits_and_refuses_the_rest_before_it_writes(columns: list[list[Tensor]], way: str) -> None:
    """Incident class: the C++ loop counted elements by the weight and took addresses of whatever came.

    What is moved is moved as by foreach from the same values: float32 arithmetic in another order, on |u| <= 1 and
    weights of size 1 at a rate of 0.1, and one rounding to the dtype stored.
    """
    before = values(columns) if readable(columns) else None
    expected = [[x.contiguous() for x in column] for column in before] if before is not None else None
    lr = torch.tensor(0.1, dtype=torch.float64)
    params, grads, exp_avgs, roots, *models = columns
    try:
        if way == "kernel":
            model = models[0] if models else ()
            cpu.s3_step_(params, grads, exp_avgs, roots, model_params=model, lr=lr, **HYPER)
        elif way == "op":
            model = models[0] if models else []
            none = (lr, None, None, None, None)
            names = {"format": "float32", "implementation": "auto"}
            torch.ops.s3.step_(params, grads, [*exp_avgs, *roots], model, *none, **HYPER, **names)
        else:
            model = models[0] if models else ()
            step_(params, grads, exp_avgs, roots, model_params=model, lr=lr, **HYPER, implementation=way)
    except RuntimeError as error:  # torch's own, before it calls the op
        assert way == "op" and "negation inputs" in str(error)
        return
    except S3Error as error:
        assert "\n" not in str(error)
        assert before is None or same(values(columns), before), f"refused ({error}), and yet written"
        return
    if expected is None or not params or _aliased(columns):
        return
    for row in zip(*expected, strict=True):
        x, g, m, r, *model = ([t] for t in row)
        foreach.s3_step_(x, g, m, r, lr=lr, model_params=model[0] if model else [], **HYPER)
    for kind, (ours, theirs) in enumerate(zip(columns, expected, strict=True)):
        for a, b in zip(ours, theirs, strict=True):
            ulp = 0 if kind == 1 else max(2e-6, torch.finfo(a.dtype).eps)
            torch.testing.assert_close(a.resolve_neg(), b, rtol=2 * ulp, atol=2 * ulp)


def _aliased(columns: list[list[Tensor]]) -> bool:
    """Whether two of the tensors share memory, where the order of rows counts."""
    places = [x.untyped_storage().data_ptr() for column in columns for x in column if x.numel()]
    return len(set(places)) < len(places)


@pytest.mark.parametrize("loop", [-1, 99])
def test_a_loop_that_is_not_there_is_refused(loop: int) -> None:
    """The number of a loop was an index into a table in C++, unlooked at."""
    columns = [[torch.rand(9)] for _ in range(4)]
    before = values(columns)
    with pytest.raises(S3Error, match="loop"):
        cpu.s3_step_(*columns, lr=torch.tensor(0.1), **HYPER, loop=loop)
    assert same(columns, before)


BAD_NUMBERS = {
    "lr": torch.tensor([0.1, 0.2]),
    "factor": torch.rand(3),
    "found_inf": torch.zeros(0),
    "seed": torch.zeros(2, dtype=torch.int64),
    "statistics": torch.zeros(5),
}


@pytest.mark.parametrize("name", BAD_NUMBERS)
@pytest.mark.parametrize("kernel", [cpu.s3_step_, foreach.s3_step_])
def test_numbers_are_one_number_and_statistics_five(kernel, name: str) -> None:
    """Five float32 given for statistics were written as five float64, past their end."""
    columns = [[torch.rand(9)] for _ in range(4)]
    before = values(columns)
    keyword = {"factor": "scale", "seed": "rounding_seed"}.get(name, name)
    with pytest.raises(S3Error, match=name):
        kernel(*columns, **{"lr": torch.tensor(0.1), **HYPER, keyword: BAD_NUMBERS[name]})
    assert same(columns, before)
