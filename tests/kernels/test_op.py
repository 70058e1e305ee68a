"""One op, whichever kernel runs: what torch's compiler knows, how the kernel is chosen, and what is logged."""

import importlib.util
import inspect
import logging

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.torch_version import TorchVersion

import s3_megatron.kernels.op as op
from s3_megatron.errors import S3Error
from s3_megatron.kernels import cpu
from s3_megatron.kernels.cpu import library
from s3_megatron.kernels.op import choose
from s3_megatron.optim import S3

WIDE = frozenset({torch.float32})


@pytest.fixture(autouse=True)
def forget_choices():
    for remembered in (choose, op._announce):
        remembered.cache_clear()
    yield
    for remembered in (choose, op._announce):
        remembered.cache_clear()


def arguments(*, model: bool = True) -> tuple[tuple[object, ...], dict[str, object]]:
    columns: list[list[Tensor]] = [[torch.rand(5), torch.rand(3, 2)] for _ in range(4)]
    models = [torch.zeros(5, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.bfloat16)] if model else []
    statistics, lr, scale = torch.zeros(5, dtype=torch.float64), torch.tensor(0.1), torch.ones(1)
    rest = {"beta1": 0.95, "beta2": 0.95, "p": 3.0, "weight_decay": 0.1, "nesterov": True, "maximize": False}
    params, grads, *states = columns
    given = (params, grads, [x for column in states for x in column], models, lr, scale, None, statistics, None)
    return given, {**rest, "format": "float32", "implementation": "auto"}


@pytest.mark.parametrize("model", [True, False])
def test_the_op_keeps_what_its_schema_says(model):
    """torch's own examination: mutations declared are those done, and the fake kernel stands for the real one."""
    args, kwargs = arguments(model=model)
    torch.library.opcheck(torch.ops.s3.step_.default, args, kwargs)


def test_a_compiled_step_is_the_eager_step_and_no_rate_compiles_it_again():
    def run(compiled: bool) -> Tensor:
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(65))
        optimizer = S3([param], lr=torch.tensor(0.1), weight_decay=0.1)

        def step() -> None:
            optimizer.step()

        if compiled:
            torch._dynamo.reset()
            step = torch.compile(step, backend="aot_eager")
        for count in range(4):
            optimizer.param_groups[0]["lr"].fill_(0.1 / (count + 1))
            param.grad = torch.randn(65)
            # The first step allocates the state, and is another graph.
            with torch._dynamo.config.patch(error_on_recompile=count > 1):
                step()
        return param.detach()

    assert torch.equal(run(compiled=True), run(compiled=False))


def test_a_compiled_step_takes_a_float_rate_as_adamw_does():
    """Incident: every new float was another graph. torch makes it an input of the graph when it first changes."""

    def graphs(kind: type[torch.optim.Optimizer]) -> int:
        param = torch.nn.Parameter(torch.randn(65))
        param.grad = torch.randn(65)
        optimizer = kind([param], lr=0.1, weight_decay=0.1)
        optimizer.step()
        torch._dynamo.reset()
        counter = CompileCounter()
        step = torch.compile(lambda: optimizer.step(), backend=counter)
        for count in range(5):
            optimizer.param_groups[0]["lr"] = 0.1 / (count + 1)
            step()
        return counter.frame_count

    assert graphs(S3) <= graphs(torch.optim.AdamW) < 5


def test_code_that_an_older_torch_compiles_calls_the_step_as_it_is(monkeypatch):
    """Incident: with torch 2.6 to 2.11, which pip may install, `torch.compile` of a step ended in its own errors."""
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    spec = importlib.util.spec_from_file_location("s3_of_an_older_torch", inspect.getfile(S3))
    older = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older)

    def graphs(kind: type[S3]) -> int:
        optimizer = kind([torch.nn.Parameter(torch.ones(3))], lr=0.1, weight_decay=0.1)
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        counter = CompileCounter()
        torch.compile(lambda: optimizer.step(), backend=counter)()
        assert optimizer.state, "it stepped"
        return counter.frame_count

    assert graphs(S3) > 0 and graphs(older.S3) == 0


def test_autograd_hears_of_a_step():
    """Incident: the C++ loop writes past autograd, and a backward pass went through weights that were no more there."""
    param = torch.nn.Parameter(torch.ones(3))
    loss = (param * param).sum()
    param.grad = torch.ones(3)
    S3([param], lr=0.1, weight_decay=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtypes", [WIDE, WIDE | {torch.bfloat16}])
def test_auto_takes_the_fast_kernel_and_logs_it_once(dtypes, caplog):
    caplog.set_level(logging.INFO)
    assert [choose("auto", "cpu", dtypes) for _ in range(3)] == ["cpu"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        f"S3 steps on cpu by kernel cpu ({library.loops()[0]})"
    ]


def test_without_a_compiler_it_is_foreach_and_the_reason_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(cpu, "unavailable", lambda: "no C++ compiler was found: install g++, or name one in CXX")
    assert choose("auto", "cpu", WIDE) == "foreach"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no C++ compiler was found: install g++" in record.getMessage() and "foreach" in record.getMessage()


def test_what_no_fast_kernel_takes_goes_silently_to_foreach(caplog):
    assert choose("auto", "meta", WIDE) == "foreach"
    assert choose("auto", "cpu", frozenset({torch.float64})) == "foreach"
    assert not caplog.records


@pytest.mark.parametrize(
    ("asked", "device", "dtypes", "message"),
    [
        ("triton", "cpu", WIDE, "the tensors are on cpu"),
        ("cpu", "cuda", WIDE, "the tensors are on cuda"),
        ("cpu", "cpu", frozenset({torch.float64}), "not torch.float64"),
        ("fast", "cpu", WIDE, "auto, foreach, cpu, triton"),
    ],
)
def test_what_was_asked_for_and_cannot_run_is_refused(asked, device, dtypes, message):
    with pytest.raises(S3Error, match=message):
        choose(asked, device, dtypes)


def test_every_implementation_that_runs_here_makes_the_same_run():
    """To rounding: a few units of 2^-24 a step, on weights of size 1 moved by 0.1 at most."""

    def run(implementation: op.Implementation) -> Tensor:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(size)) for size in (0, 1, 4097)]
        optimizer = S3(params, lr=0.1, weight_decay=0.1, implementation=implementation)
        for _ in range(5):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
        return torch.cat([param.detach() for param in params])

    torch.testing.assert_close(run("cpu"), run("foreach"), rtol=0, atol=3e-6)
    assert torch.equal(run("auto"), run("cpu"))
