"""What the C++ library reads off tensors in one call, and what happens where it can read nothing."""

import ctypes
import gc
import logging
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from s3_megatron.kernels import metadata, rows
from s3_megatron.kernels.call import GRADIENTS, ROLES
from s3_megatron.kernels.cpu import library
from s3_megatron.optim import S3
from tests.kernels.by_keyword import columns_of, cpu

HYPER = {"beta1": 0.95, "beta2": 0.95, "p": 3.0, "weight_decay": 0.1, "nesterov": True}
KINDS = (Tensor, nn.Parameter)


def read(*columns: list[Tensor]) -> list[list[int]] | None:
    memory = metadata.read(columns, KINDS)
    return None if memory is None else memory.table.tolist()


def row(**others: Tensor) -> list[list[Tensor]]:
    """One row of four, of which some are given by number: ``_1`` is the gradient."""
    return [[others.get(f"_{kind}", torch.zeros(4))] for kind in range(4)]


def test_it_reads_here() -> None:
    """All else in this file would pass where every look is by Python."""
    assert metadata.available()


def test_addresses_and_elements() -> None:
    weights = [torch.zeros(3, 4)[1], torch.zeros(0, 5), torch.zeros(()), torch.zeros(2, 3, 4, 5)]
    columns = [weights, *([torch.zeros_like(x, dtype=torch.bfloat16) for x in weights] for _ in range(4))]
    expected = [[*(x.data_ptr() for x in row), row[0].numel()] for row in zip(*columns, strict=True)]
    assert read(*columns) == expected
    assert read(*columns[:4]) == [[*row[:4], 0, row[-1]] for row in expected]


@pytest.mark.parametrize("count", [1, 15, 16, 17, 48, 100])
def test_any_number_of_rows_and_the_last_one_counts(count: int) -> None:
    """Rows are read sixteen at a time."""
    columns = [[torch.zeros(4) for _ in range(count)] for _ in range(4)]
    assert read(*columns) == [[*(x.data_ptr() for x in row), 0, 4] for row in zip(*columns, strict=True)]
    columns[3][-1] = torch.zeros(5)
    assert read(*columns) is None


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (6, 1, 4, 1), (3, 3)])
def test_one_order_of_memory_a_row_is_enough(shape: tuple[int, ...]) -> None:
    """channels_last weights have channels_last gradients and states."""
    x = [torch.zeros(shape).mT.contiguous().mT for _ in range(4)]
    assert read(*([each] for each in x)) == [[*(each.data_ptr() for each in x), 0, x[0].numel()]]
    x[3] = torch.zeros(shape)
    assert (read(*([each] for each in x)) is None) == (x[0].stride() != x[3].stride())


def subclass(x: Tensor) -> Tensor:
    class Mine(Tensor):
        pass

    return x.as_subclass(Mine)


def test_what_is_no_memory_is_seen_in_any_column() -> None:
    others = {
        "expanded": torch.zeros(1).expand(4),
        "every other": torch.zeros(8)[::2],
        "overlapping": torch.zeros(9).as_strided((2, 2), (1, 1)),
        "on meta": torch.zeros(4, device="meta"),
        "sparse": torch.zeros(4).to_sparse(),
        "complex": torch.zeros(4, dtype=torch.complex64),
        "int": torch.zeros(4, dtype=torch.int32),
        "negative": torch._neg_view(torch.zeros(4)),
        "zero without memory": torch._efficientzerotensor(4),
        "mkldnn": torch.zeros(4, 4).to_mkldnn(),
        "nested": torch.nested.nested_tensor([torch.zeros(4)]),
        "quantized": torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8),
        "subclass": subclass(torch.zeros(4)),
        "functional": torch._to_functional_tensor(torch.zeros(4)),
        "no tensor": None,
        "a number": 3.0,
    }
    for name, x in others.items():
        for kind in range(4):
            assert read(*row(**{f"_{kind}": x})) is None, (name, kind)


def test_a_column_has_one_dtype_and_all_one_device() -> None:
    columns = [[torch.zeros(4), torch.zeros(4)] for _ in range(4)]
    columns[2][1] = torch.zeros(4, dtype=torch.bfloat16)
    assert read(*columns) is None
    assert read(*([torch.zeros(4), torch.zeros(4, device="meta")] for _ in range(4))) is None


def test_versions_are_counted_of_all_but_gradients() -> None:
    """Autograd must see what was written: a backward through it raises."""
    columns = [[torch.zeros(4), torch.zeros(3)] for _ in range(5)]
    before = [[x._version for x in column] for column in columns]
    assert metadata.read(columns, KINDS).count_up_versions()
    after = [[x._version for x in column] for column in columns]
    assert after == [[version + (kind != 1) for version in column] for kind, column in enumerate(before)]


def test_a_weight_saved_for_backward_and_stepped_is_refused_there() -> None:
    param = nn.Parameter(torch.ones(4))
    loss = (param * param).sum()
    param.grad = torch.ones(4)
    optimizer = S3([param], lr=0.1, weight_decay=0.1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_raise_as_they_do_under_python() -> None:
    """torch throws through C there: the process must not end."""
    with torch.inference_mode():
        columns = [[torch.ones(4)] for _ in range(4)]
    assert not metadata.read(columns, KINDS).count_up_versions()


def test_nothing_is_kept_alive() -> None:
    params = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    optimizer = S3(params, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones(4)
        optimizer.step()
    grads = [weakref.ref(param.grad) for param in params]
    weights = [weakref.ref(param) for param in params]
    optimizer.zero_grad()
    assert not any(ref() is not None for ref in grads)
    del optimizer, params, param
    gc.collect()
    assert not any(ref() is not None for ref in weights)


@pytest.mark.parametrize(
    "mode", [FakeTensorMode, lambda: torch.device("meta"), torch.inference_mode], ids=["fake", "device", "inference"]
)
def test_a_first_look_inside_a_mode_is_tried_with_real_tensors(mode) -> None:
    """Under FakeTensorMode the trial took fake tensors' addresses, and the process looked one by one from then on."""
    with mode():
        assert metadata._tried.__wrapped__(library.load(), tuple(library.TYPES)) is not None


SWAPPED = [("is_neg", "bump_version"), ("storage_size", "storage_offset"), ("sizes", "strides"), ("dtype", "layout")]


@pytest.mark.parametrize(("one", "other"), SWAPPED)
def test_a_torch_whose_functions_mean_something_else_is_not_used(one, other, monkeypatch, caplog) -> None:
    real = metadata._functions

    def swapped(dtypes) -> metadata._Torch:
        found = real(dtypes)
        first, second = getattr(found, one), getattr(found, other)
        setattr(found, one, second)
        setattr(found, other, first)
        return found

    monkeypatch.setattr(metadata, "_functions", swapped)
    with caplog.at_level(logging.INFO):
        assert metadata._tried.__wrapped__(library.load(), tuple(library.TYPES)) is None
    assert "one by one" in caplog.text


@pytest.mark.parametrize("name", ["_IS_NEG", "_BUMP_VERSION"])
def test_a_torch_without_a_function_is_not_used(name, monkeypatch, caplog) -> None:
    monkeypatch.setattr(metadata, name, "no_such_symbol")
    with caplog.at_level(logging.INFO):
        assert metadata._tried.__wrapped__(library.load(), tuple(library.TYPES)) is None
    assert "no_such_symbol" in caplog.text


def test_without_a_compiled_library_nothing_is_compiled_to_read(monkeypatch, tmp_path) -> None:
    """A GPU node without a compiler: the Triton kernel runs, and looks by Python."""
    monkeypatch.setenv("S3_MEGATRON_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "INSTALLED", tmp_path)
    assert library._compiled_before.__wrapped__() is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("columns_last", [4, 3])
def test_channels_last_is_moved_where_it_lies(columns_last: int) -> None:
    """Incident: such tensors were copied there and back each step. To the bit the contiguous ones' step, as no
    element depends on another."""
    torch.manual_seed(0)
    plain = [[torch.rand(2, 3, 4, 5)] for _ in range(4)]
    lists = [[x[0].clone()] for x in plain]
    for column in lists[:columns_last]:
        column[0] = column[0].contiguous(memory_format=torch.channels_last)
    laid = rows.lay_out(columns_of(*lists), library.TYPES)
    assert (laid.straight is laid.columns) == (columns_last == 4)
    for each in (plain, lists):
        cpu.s3_step_(*each, lr=0.1, **HYPER)
    for (a,), (b,) in zip(plain, lists, strict=True):
        assert torch.equal(a, b)


def test_the_structures_are_those_of_the_header() -> None:
    assert ctypes.sizeof(metadata._Torch) == 12 * 8 + 2 * 8 + 4 * 4
    header = Path(library.__file__).with_name("metadata.h").read_text()
    body = re.sub("//.*", "", header.split("struct S3Torch {")[1].split("};")[0])
    assert re.findall(r"(\w+)(?=\)\(|[,;\[])", body) == [name for name, _ in metadata._Torch._fields_]
    # A kind of tensor that one side lacks would shift every address behind it.
    header = Path(library.__file__).with_name("step.h").read_text()
    kinds = re.search(r"enum S3Kind {(.*)}", header)[1].split(",")
    assert f"constexpr int S3_KINDS = {len(ROLES)};" in header
    assert len(kinds) == len(ROLES) and kinds[GRADIENTS].strip() == "S3_GRAD"
