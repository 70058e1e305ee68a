"""The pointer tables: every element once, no tensor kept alive, nothing built twice. No GPU and no Triton needed."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from s3_megatron.errors import S3Error
from s3_megatron.kernels.triton.tables import CAPACITY, Tables, plan

BLOCK = 1024


def find(cache, columns):
    addresses = np.array([[x.data_ptr() for x in column] for column in columns])
    widths = [column[0].element_size() for column in columns]
    return cache.find(columns[0][0].device, widths, addresses, np.array([x.numel() for x in columns[0]]))


def _spans(works, rows, item_size):
    """(launch, first byte, bytes) of the first column, for every program."""
    for launch, work in enumerate(works):
        for item in work.tolist():
            row, block = item & 0xFFFFFFFF, item >> 32
            elements = min(BLOCK, int(rows[row, -1]) - block * BLOCK)
            assert elements > 0
            yield launch, int(rows[row, 0]) + block * BLOCK * item_size, elements * item_size


@pytest.mark.parametrize("item_size", [2, 4])
def test_every_element_is_worked_on_once(item_size):
    """And what goes to the aligned launch consists of whole 16-element groups at 16-byte addresses."""
    sizes = np.array([0, 1, 15, 16, 17, 1023, 1024, 1025, 5000, 40], np.int64)
    begins = 2**40 + 2**20 * np.arange(len(sizes), dtype=np.int64)
    begins[-1] += item_size  # an odd element
    addresses = np.stack([begins, begins + 2**30])
    works, rows = plan(addresses, sizes, (item_size, item_size), BLOCK, 6)
    seen = sorted(_spans(works, rows, item_size), key=lambda span: span[1])
    for begin, size in zip(begins.tolist(), sizes.tolist(), strict=True):
        inside = [span for span in seen if begin <= span[1] < begin + 2**20]
        at = begin
        for launch, first, count in inside:
            assert first == at
            if launch == 0:
                assert first % 16 == 0 and count % (16 * item_size) == 0
            at += count
        assert at == begin + size * item_size
    assert (rows[:, 1] - rows[:, 0] == 2**30).all()
    assert not rows[:, 2:5].any()
    assert 40 in rows[rows[:, 0] % 16 != 0][:, -1]  # the odd row went whole to the other launch


def test_one_misaligned_column_takes_its_row_out_of_the_aligned_launch():
    addresses = np.array([[1 << 20], [(1 << 21) + 4]], np.int64)
    works, rows = plan(addresses, np.array([64], np.int64), (4, 4), BLOCK, 6)
    assert [len(work) for work in works] == [0, 1]
    assert rows[0].tolist() == [1 << 20, (1 << 21) + 4, 0, 0, 0, 64]


def test_more_elements_than_32_bits_count():
    size = 2**32 + 2**31 + 5
    works, rows = plan(np.array([[1 << 40]], np.int64), np.array([size], np.int64), (4,), BLOCK, 6)
    assert len(rows) == 2 and rows[:, -1].tolist() == [size - 5, 5]
    blocks = (works[0] >> 32).tolist()
    assert blocks == list(range((size - 5) // BLOCK))
    assert rows[1, 0] == (1 << 40) + 4 * (size - 5)


def test_ten_thousand_tensors_are_two_launches():
    columns = [[torch.zeros(17).view(-1) for _ in range(10_000)]]
    table = find(Tables(BLOCK, 6), columns)
    assert len(table.launches) <= 2
    assert sum(launch.work.numel() for launch in table.launches) <= 20_000


def _column(*sizes):
    return [torch.zeros(size) for size in sizes]


def test_a_table_is_built_anew_only_when_an_address_or_a_size_changes():
    cache, columns = Tables(BLOCK, 6), [_column(40, 50), _column(40, 50)]
    first = find(cache, columns)
    assert find(cache, [list(column) for column in columns]) is first
    assert find(cache, [columns[0], [x.clone() for x in columns[1]]]) is not first
    assert find(cache, [[x[:30] for x in column] for column in columns]) is not first
    low = [[x.view(torch.bfloat16)[: x.numel()] for x in column] for column in columns]
    assert find(cache, low) is not first  # tails begin elsewhere
    assert find(cache, columns) is first


def test_the_cache_is_bounded_and_holds_no_tensor():
    cache = Tables(BLOCK, 6)
    keep = [_column(20) for _ in range(CAPACITY + 5)]
    for column in keep:
        find(cache, [column])
    assert len(cache._recent) == CAPACITY
    # Storage is freed with its last tensor; a view in the cache would hold it.
    storage = keep[-1][0].untyped_storage()
    before = torch._C._storage_Use_Count(storage._cdata)
    find(cache, [keep[-1]])
    assert torch._C._storage_Use_Count(storage._cdata) == before


def test_a_capture_needs_a_step_before_it(monkeypatch):
    """And its table outlives every later one: the graph reads it."""
    cache = Tables(BLOCK, 6)
    columns = [_column(20)]
    built = find(cache, columns)
    key = next(iter(cache._recent))
    fake = _Fake(columns[0][0])
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(S3Error, match="run one step first"):
            find(cache, [[fake]])
        cache._recent[(fake.device, *key[1:])] = built
        assert find(cache, [[fake]]) is built
    for _ in range(CAPACITY + 1):
        find(cache, [_column(20)])
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert find(cache, [[fake]]) is built


class _Fake:
    """A tensor that claims to be on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, tensor):
        self.data_ptr, self.numel, self.element_size = tensor.data_ptr, tensor.numel, tensor.element_size


def test_triton_is_not_imported_with_the_package():
    """The package is asked on every machine whether it can run: that has to be cheap."""
    code = "import sys, s3_megatron.kernels.triton as t; print(t.unavailable()); print('triton' in sys.modules)"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert lines[-1] == "False"
    if not torch.cuda.is_available():
        assert lines[:-1] == ["no", "GPU"]
