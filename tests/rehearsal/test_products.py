"""Products of 16-bit operands under the rehearsal: float32's, rounded once, wherever they are asked for."""

import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from s3_megatron import rehearsal
from s3_megatron.errors import S3Error
from s3_megatron.rehearsal import products
from s3_megatron.train.entry import one_line_errors, prepare

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal refuses to load where CUDA is")

SHORT = (torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", SHORT, ids=products.NAMES.get)
# What torch's kernels were called with: one set of dtypes a call.
Calls = list[set[torch.dtype]]


@pytest.fixture
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Products in float32, and what reaches torch's own kernels."""
    seen: Calls = []
    original = torch.library.get_kernel

    class Recorded:
        def __init__(self, *args: Any) -> None:
            self.kernel = original(*args)

        def call_boxed(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append({value.dtype for value in (*args, *kwargs.values()) if isinstance(value, Tensor)})
            return self.kernel.call_boxed(keyset, *args, **kwargs)

    monkeypatch.setattr(torch.library, "get_kernel", Recorded)
    undo = products.compute_in_float32(getattr(request, "param", SHORT))
    yield seen
    undo()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


# Every way to ask for a product that the list of kernels is meant to cover, and its operands' shapes.
OPS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "matmul": (torch.matmul, [(5, 70), (70, 33)]),
    "matmul, batched": (torch.matmul, [(2, 3, 5, 70), (3, 70, 33)]),
    "matmul, folded": (torch.matmul, [(4, 5, 70), (70, 33)]),
    "@": (lambda a, b: a @ b, [(5, 70), (70, 33)]),
    "mm": (torch.mm, [(5, 70), (70, 33)]),
    "bmm": (torch.bmm, [(3, 5, 70), (3, 70, 33)]),
    "mv": (torch.mv, [(5, 70), (70,)]),
    "dot": (torch.dot, [(70,), (70,)]),
    "vdot": (torch.vdot, [(70,), (70,)]),
    "linear": (functional.linear, [(4, 5, 70), (33, 70)]),
    "linear with bias": (functional.linear, [(5, 70), (33, 70), (33,)]),
    "addmm": (lambda *x: torch.addmm(*x, beta=0.5, alpha=2), [(33,), (5, 70), (70, 33)]),
    "addmv": (torch.addmv, [(5,), (5, 70), (70,)]),
    "baddbmm": (lambda *x: torch.baddbmm(*x, beta=0.5, alpha=0.3), [(3, 5, 33), (3, 5, 70), (3, 70, 33)]),
    "addbmm": (torch.addbmm, [(5, 33), (3, 5, 70), (3, 70, 33)]),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), [(3, 5, 70), (3, 70, 33)]),
    "multi_head_attention": (lambda a: functional.scaled_dot_product_attention(a, a, a), [(1, 2, 8, 16)]),
    "causal attention": (
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        [(2, 3, 40, 16)] * 3,
    ),
    "addmm_activation": (torch._addmm_activation, [(33,), (5, 70), (70, 33)]),
    "addmm_": (lambda c, a, b: c.clone().addmm_(a, b), [(5, 33), (5, 70), (70, 33)]),
    "addmv_": (lambda c, a, b: c.clone().addmv_(a, b), [(5,), (5, 70), (70,)]),
    "baddbmm_": (lambda c, a, b: c.clone().baddbmm_(a, b), [(3, 5, 33), (3, 5, 70), (3, 70, 33)]),
    "addbmm_": (lambda c, a, b: c.clone().addbmm_(a, b), [(5, 33), (3, 5, 70), (3, 70, 33)]),
    "transposed": (lambda a, b: a.t() @ b.t(), [(70, 5), (33, 70)]),
    "strided": (lambda a, b: a[::2, 1::3] @ b[::3], [(10, 211), (210, 33)]),
    "expanded": (lambda a, b: torch.bmm(a.expand(3, 5, 70), b), [(1, 5, 70), (3, 70, 33)]),
    "no rows": (torch.mm, [(0, 70), (70, 33)]),
    "nothing to sum": (lambda *x: torch.addmm(*x, beta=2), [(5, 33), (5, 0), (0, 33)]),
    "no batch": (torch.bmm, [(0, 5, 70), (0, 70, 33)]),
}


@dtypes
@pytest.mark.parametrize("name", OPS)
def test_equals_the_float32_product_rounded_once(calls: Calls, name: str, dtype: torch.dtype) -> None:
    op, shapes = OPS[name]
    operands = [random(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
    result = op(*operands)
    assert calls and set().union(*calls) == {torch.float32}
    assert result.dtype == dtype
    wide = op(*(operand.float() for operand in operands))
    assert torch.equal(result, wide.to(dtype)) and result.shape == wide.shape and result.stride() == wide.stride()


@dtypes
@pytest.mark.parametrize("name", ["mm", "bmm", "mv", "linear", "matmul, folded", "transposed", "causal attention"])
def test_so_are_gradients(calls: Calls, name: str, dtype: torch.dtype) -> None:
    op, shapes = OPS[name]
    operands = [random(*shape, seed=seed).to(dtype).requires_grad_() for seed, shape in enumerate(shapes)]
    wide = [operand.detach().float().requires_grad_() for operand in operands]
    result = op(*operands)
    upstream = random(*result.shape, seed=9).to(dtype)
    gradients = torch.autograd.grad(result, operands, upstream)
    if "attention" in name:  # its backward reads the output, which is rounded
        reference = op(*wide)
        reference.data.copy_(result.detach())
    else:
        reference = op(*wide)
    for ours, theirs in zip(gradients, torch.autograd.grad(reference, wide, upstream.float()), strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs.to(dtype))
    assert set().union(*calls) == {torch.float32}


@dtypes
def test_writes_where_it_is_asked_to(calls: Calls, dtype: torch.dtype, recwarn: pytest.WarningsRecorder) -> None:
    a, b, c = (random(8, 8, seed=seed).to(dtype) for seed in range(3))
    expected = (a.float() @ b.float()).to(dtype)
    for out in (torch.empty(0, dtype=dtype), torch.full((8, 8), torch.nan, dtype=dtype), torch.zeros_like(a).t()):
        strides = out.stride()
        assert torch.mm(a, b, out=out) is out and torch.equal(out, expected)
        assert out.stride() == (strides if len(strides) == 2 else (8, 1))
    column = torch.zeros(8, 16, dtype=dtype)[:, ::2]
    torch.matmul(a, b, out=column)
    assert torch.equal(column, expected)
    assert torch.equal(torch.addmm(c, a, b, out=c.clone()), torch.addmm(c, a, b))
    nan = torch.full((8, 8), torch.nan, dtype=dtype)
    assert torch.equal(torch.addmm(nan, a, b, beta=0), expected), "with beta 0 it is not read"
    assert not recwarn.list
    with pytest.warns(UserWarning, match="was resized"):
        torch.mm(a, b, out=torch.zeros(3, 3, dtype=dtype))


@dtypes
def test_refuses_what_torch_refuses_in_its_words(dtype: torch.dtype) -> None:
    a, b = random(4, 4).to(dtype), random(4, 4, seed=1).to(dtype)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    wrong: list[Callable[[], object]] = [
        lambda: a @ b.float(),
        lambda: a.float() @ b,
        lambda: a @ b.to(other),
        lambda: torch.addmm(a.float(), a, b),
        lambda: torch.bmm(a[None], b[None].double()),
        lambda: torch.mm(a, b, out=torch.empty(4, 4)),
        lambda: torch.mm(a, b, out=torch.empty(4, 4, dtype=other)),
        lambda: torch.mm(a, b[:3]),
        lambda: torch.mm(a, b[0]),
        lambda: torch.bmm(a, b),
        lambda: a.clone().addmm_(a[:2], b),
        lambda: torch.dot(a[0], b[0, :3]),
        lambda: a[:1].expand(4, 4).addmm_(a, b),
        lambda: functional.linear(a.clone().requires_grad_(), b, a[0].float()),
    ]

    def words() -> list[str]:
        messages = []
        for ask in wrong:
            with pytest.raises(RuntimeError) as refused:
                ask()
            messages.append(re.sub(r"\n.*", "", str(refused.value), flags=re.S))
        return messages

    torchs = words()
    undo = products.compute_in_float32(SHORT)
    try:
        assert words() == torchs
    finally:
        undo()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.complex64])
def test_leaves_other_dtypes_alone(calls: Calls, dtype: torch.dtype) -> None:
    a = (random(6, 6) * 9).to(dtype)
    result = a @ a
    assert calls == [{dtype}]
    assert result.dtype == dtype


@pytest.mark.parametrize("calls", [[torch.float16]], indirect=True, ids=["fp16"])
def test_only_the_dtypes_asked_for(calls: Calls) -> None:
    """Zen 4 has instructions for bf16, not for fp16."""
    for dtype in SHORT:
        random(4, 4).to(dtype) @ random(4, 4).to(dtype)
        functional.scaled_dot_product_attention(*[random(1, 1, 4, 4).to(dtype)] * 3)
    assert calls == [{torch.bfloat16}] * 2 + [{torch.float32}] * 2


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> Iterator[Calls]:
    """A whole rehearsal over the products that are recorded."""
    monkeypatch.setenv(products.VARIABLE, "torch")
    rehearsal.activate()
    yield calls
    rehearsal.deactivate()


def test_backward_and_other_threads_have_it_too(rehearsed: Calls) -> None:
    """Tensor.backward() runs with every TorchFunctionMode off, and a thread starts without: a first version, in such a
    mode, sped up the forward half of a DeepSpeed run alone."""

    def train() -> None:
        weight = random(6, 6).bfloat16().requires_grad_()
        (random(6, 6).bfloat16() @ weight).sum().backward()

    for run in (train, lambda: [thread.start() or thread.join() for thread in [threading.Thread(target=train)]]):
        rehearsed.clear()
        run()
        assert rehearsed == [{torch.float32}] * 2


class ShortOps(TorchDispatchMode):
    """Collects the names of the operators that are called with a 16-bit tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(value, Tensor) and value.dtype in SHORT for value in args):
            self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **kwargs or {})


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from megatron.core import jit, parallel_state, tensor_parallel

    # Where an earlier test has imported Megatron without a rehearsal, it is torch.compile still.
    monkeypatch.setattr(jit, "jit_fuser", lambda function: function)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@dtypes
def test_no_16_bit_product_is_left_in_a_gpt(rehearsed: Calls, one_rank: None, dtype: torch.dtype) -> None:
    """Megatron's linear layers are autograd functions of their own, with products in their backward."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=64, max_sequence_length=16).to(dtype)
    tokens = torch.arange(32).reshape(2, 16)
    mask = torch.ones(2, 1, 16, 16).triu(1).bool()
    rehearsed.clear()
    with ShortOps() as called:
        loss = model(tokens, torch.arange(16).expand(2, 16), mask, labels=tokens.roll(-1, 1)).float().mean()
        forward = len(rehearsed)
        loss.backward()
    assert forward >= 2 * 6 + 1 and len(rehearsed) >= 3 * forward - 2, "four linears and two of attention, each layer"
    assert set().union(*rehearsed) == {torch.float32}
    assert all(torch.isfinite(param.grad).all() and param.grad.any() for param in model.parameters())

    covered = {name.removesuffix(".out") for name in (*products.PRODUCTS, *products.ATTENTION)}
    kinds = r"mm|mv|dot|matmul|linear|conv|attention|bilinear|rnn|lstm|gru"
    found = {name for name in called.names if re.search(kinds, name)}
    assert found and found <= covered


def test_is_put_back_with_the_rest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(products.VARIABLE, "float32")
    own = torch.library.get_kernel("aten::mm", "CPU")
    rehearsal.activate()
    assert repr(torch.library.get_kernel("aten::mm", "CPU")) != repr(own)
    rehearsal.deactivate()
    assert repr(torch.library.get_kernel("aten::mm", "CPU")) == repr(own)
    message = "REHEARSAL matrix products: bf16 in float32, rounded once; fp16 in float32, rounded once"
    assert capsys.readouterr().err.count(message) == 1


@pytest.mark.parametrize(
    ("cpu", "bf16", "fp16"),
    [
        ({"avx2": True}, "in float32", "in float32"),
        ({"avx512_f": True, "avx512_vnni": True}, "in float32", "in float32"),  # Skylake, Cascade Lake, Ice Lake
        ({"avx512_f": True, "avx512_bf16": True}, "by torch", "in float32"),  # Cooper Lake, Zen 4
        ({"avx512_bf16": True, "avx512_fp16": True, "amx_bf16": True}, "by torch", "by torch"),  # Sapphire Rapids
        ({"neon": True, "fp16_arith": True}, "in float32", "in float32"),
        ({"neon": True, "fp16_arith": True, "bf16": True}, "by torch", "in float32"),
        ({}, "in float32", "in float32"),
    ],
)
def test_the_cpu_decides(monkeypatch: pytest.MonkeyPatch, cpu: dict[str, bool], bf16: str, fp16: str) -> None:
    """torch's answers for other CPUs are stood in for: there is one CPU here."""
    monkeypatch.delenv(products.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: True)
    line = products.describe(products.choose())
    assert re.fullmatch(rf"matrix products: bf16 {bf16}.*; fp16 {fp16}.* \({products.VARIABLE}=auto\)", line)

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)  # ONEDNN_MAX_CPU_ISA=AVX2
    assert torch.bfloat16 in products.choose()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert products.choose() == list(SHORT)


def test_the_variable_overrules_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.VARIABLE, "float32")
    assert products.choose() == list(SHORT)
    monkeypatch.setenv(products.VARIABLE, "torch")
    assert products.choose() == []
    assert products.describe([]) == "matrix products: bf16 by torch; fp16 by torch (S3_REHEARSAL_PRODUCTS=torch)"
    decisions = []
    for word in ("auto", ""):
        monkeypatch.setenv(products.VARIABLE, word)
        decisions.append(products.choose())
    assert decisions[0] == decisions[1], "empty is as good as unset"


@pytest.mark.parametrize("word", ["fp32", "Float32", "1", "off", "torch,float32", " "])
def test_an_unknown_word_is_one_line_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    monkeypatch.setenv(products.VARIABLE, word)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # prepare() sets it for good
    with pytest.raises(SystemExit) as end, one_line_errors():
        prepare([], rehearse=True)
    assert end.value.code == 2
    wrong, allowed = f"S3_REHEARSAL_PRODUCTS={word} is none of auto, float32, torch", "use one of them, or unset it"
    assert capsys.readouterr().err.splitlines()[-1] == f"s3_megatron: error: {wrong}: {allowed}"
    assert not torch.cuda.is_available()


def test_another_torch_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.VARIABLE, "float32")
    monkeypatch.setattr(products, "PRODUCTS", ("mm", "no_such_kernel"))
    with pytest.raises(S3Error, match=r"no_such_kernel does not exist\): use torch 2\.13, or set .*=torch"):
        rehearsal.activate()
    assert not torch.cuda.is_available(), "nothing is left of a rehearsal that did not start"
    monkeypatch.delattr(torch.library, "get_kernel")
    with pytest.raises(S3Error, match=r"use torch 2\.13, or set S3_REHEARSAL_PRODUCTS=torch"):
        products.choose()
    monkeypatch.delenv(products.VARIABLE)
    assert products.choose() == [], "a check on a login node needs no products"
