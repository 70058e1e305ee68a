"""The Triton kernel in Triton's interpreter. test_numerics.py runs this file in a process of its own: the interpreter
is chosen when Triton is imported."""

import pytest
import torch

from s3_megatron.kernels.triton import kernel, launch, trial, unavailable
from tests.kernels.by_keyword import triton
from tests.kernels.triton.conversions import exact_conversions  # noqa: F401  (of every test here)
from tests.kernels.triton.triton_oracle import EDGES, Problem, check, expected
from tests.kernels.triton.variants import BF16, F16, F32, SIZES, by_place, with_strides

# weight, gradient, state, model weight: what engines use, every dtype in every place.
DTYPES = [
    (F32, F32, F32, None),
    (F32, BF16, BF16, BF16),
    (F32, F16, F32, F16),
    (BF16, BF16, BF16, None),
    (F16, F16, F32, BF16),
]


def test_the_interpreter_makes_it_available():
    assert unavailable() is None


def test_the_doctors_launch(monkeypatch):
    """The doctor printed "GPU: Triton" of any GPU that torch saw, and launched nothing on it."""
    assert trial.fault("cpu") is None
    with monkeypatch.context() as patch:
        patch.setattr(trial, "step_", lambda *args, **kwargs: None)
        assert trial.fault("cpu").startswith("a launch is off by ")

    def fails(*args, **kwargs):
        raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid\nand more")

    monkeypatch.setattr(launch, "step_", fails)
    wanted = "a launch fails: RuntimeError: Triton Error [CUDA]: device kernel image is invalid"
    assert trial.fault("cpu") == wanted


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 8])
@pytest.mark.parametrize("types", DTYPES)
def test_a_step_is_the_oracles(types, p):
    before = with_strides(Problem.of(SIZES, p=p, nesterov=types[1] != F16, **by_place(types)))
    check(before, before.step())


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_without_nesterov_and_with_betas_apart(p):
    """Theorem 2's larger bound: nothing is clamped. beta2 = 0 forgets, beta1 = 0 has no momentum."""
    for beta1, beta2 in [(0.9, 0.99), (0.0, 0.0), (0.0, 0.9), (0.9, 0.0)]:
        before = Problem.of((15, 200), beta1=beta1, beta2=beta2, p=p, nesterov=False, **by_place(DTYPES[0]))
        check(before, before.step())


def test_the_oracle_refuses_what_is_too_far():
    """A check that cannot fail is a defect: 16 ulp on one coordinate of each result, and a changed edge."""
    before = Problem.of((200,), **by_place(DTYPES[0]))
    good = before.step()
    check(before, good)
    for column in ("params", "exp_avgs", "exp_avg_roots"):
        bad = good.clone()
        getattr(bad, column)[0][100] *= 1 + 2.0**-16
        with pytest.raises(AssertionError, match="of row 0 at \\[100\\]"):
            check(before, bad)
        bad = good.clone()
        getattr(bad, column)[0][10] += 1e-6  # its gradient is NaN
        with pytest.raises(AssertionError, match="of row 0 at \\[10\\]"):
            check(before, bad)


def test_maximize_and_scale():
    scale = torch.tensor([2.0**-10 * 1.5])
    before = Problem.of((15, 200), scale=scale, maximize=True, **by_place(DTYPES[1]))
    check(before, before.step())


def test_found_inf_is_a_no_op_of_every_store():
    statistics = torch.arange(5, dtype=torch.float64)
    seed = torch.tensor([7])
    problem = with_strides(Problem.of(SIZES, statistics=statistics, rounding_seed=seed, **by_place(DTYPES[1])))
    for value, stays in [(1.0, True), (float("nan"), True), (0.0, False)]:
        problem.settings["found_inf"] = torch.tensor([value])
        assert (problem.step().bits() == problem.bits()) is stays
        assert (statistics.tolist() == [0, 1, 2, 3, 4]) is stays


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lr_is_read_from_a_pointer(dtype, monkeypatch):
    """On a GPU lr is a pointer; on the CPU only the launch itself can be given one."""
    before = Problem.of((15, 200), lr=torch.tensor(0.25, dtype=dtype), **by_place(DTYPES[0]))
    arguments = launch._arguments

    def by_pointer(rule, step):
        return arguments(rule, step) | {"lr": -1.0, "lr_pointer": rule.lr}

    monkeypatch.setattr(launch, "_arguments", by_pointer)
    check(before, before.step())


def test_statistics_are_added_to_and_maxed_into():
    statistics = torch.tensor([1.0, 0.5, 1.0, 1.0, 1.0], dtype=torch.float64)
    before = Problem.of(SIZES, p=1, statistics=statistics, **by_place(DTYPES[0]))
    before.step()
    rows = [expected(before, row) for row in range(len(SIZES))]
    u = torch.cat([row.update for row in rows])
    g = torch.cat(before.grads).double()
    agree = int(((u * g) > 0).sum())
    assert not ((u.abs() - 0.9).abs() < 1e-5).any()  # or the count would hang on rounding
    # Sums of 1,024 float32: 10 levels of a tree, each half an ulp, plus u's own error.
    torch.testing.assert_close(statistics[0].item(), 1 + u.abs().sum().item(), rtol=20 * 2.0**-24, atol=0)
    torch.testing.assert_close(statistics[1].item(), u.abs().max().item(), rtol=8 * 2.0**-24, atol=0)
    assert statistics[2:].tolist() == [1 + int((u.abs() > 0.9).sum()), 1 + agree, 1 + len(u)]


def test_the_update_never_exceeds_one():
    """Sign steps of one sign reach 1 + 1.1e-6 in float32 without the clamp."""
    grads = [torch.rand(2048, generator=torch.Generator().manual_seed(1)) + 0.5]
    for p in (1, 1.5, 2, 3):
        x = [torch.zeros(2048)]
        triton.s3_step_(
            x,
            grads,
            [g.clone() for g in grads],
            [g.clone() for g in grads],
            lr=torch.tensor(1.0),
            beta1=0.95,
            beta2=0.95,
            p=p,
            weight_decay=0.1,
            nesterov=True,
        )
        assert 1 - 1e-5 < float(x[0].abs().max()) <= 1.0


def test_any_sharding_and_alignment_gives_the_same_bits():
    whole = Problem.of((3000,), model=BF16, param=F32, grad=BF16, state=BF16)
    shards = Problem([], [], [], [], [], settings=whole.settings)
    for begin, end in [(0, 1), (1, 18), (18, 1042), (1042, 1042), (1042, 3000)]:
        for name in ("params", "grads", "exp_avgs", "exp_avg_roots", "model_params"):
            getattr(shards, name).append(getattr(whole, name)[0][begin:end].clone())
    stepped = shards.step()
    for name in ("params", "exp_avgs", "exp_avg_roots", "model_params"):
        assert torch.equal(torch.cat(getattr(stepped, name)), getattr(whole.step(), name)[0])


def test_stochastic_rounding_keeps_the_mean():
    """32 seeds x 2,036 equal elements: one rounding has a deviation of at most half an ulp."""
    size, seeds = 2048, 32
    begin = len(EDGES)
    before = Problem.of((size,), **by_place((F32, F32, BF16, None)))
    before.grads[0][begin:] = 0.7
    before.exp_avgs[0][begin:] = 0.3
    before.exp_avg_roots[0][begin:] = 0.6
    runs = []
    for seed in range(seeds):
        before.settings["rounding_seed"] = torch.tensor([seed + 2**33])
        runs.append(before.step())
        check(before, runs[-1], steps=1.0)  # up or down, never further
    assert runs[0].bits() != runs[1].bits()
    assert runs[-1].bits() == before.step().bits()
    want = expected(before, 0)
    ups = []
    for name, exact in [("exp_avgs", want.m), ("exp_avg_roots", want.r)]:
        values = torch.stack([getattr(run, name)[0][begin:].double() for run in runs])
        ulp = float(values.max() - values.min())
        exact = float(exact[-1])
        assert 2.0**-9 * exact <= ulp <= 2.0**-7 * exact  # two neighbours of bfloat16
        # Five deviations over the whole, over the seeds of each element, and over the elements of each seed.
        for mean, count in [(values.mean(), seeds * size), (values.mean(0), seeds), (values.mean(1), size)]:
            assert float((mean - exact).abs().max()) < 5.5 * ulp / 2 / count**0.5
        ups.append((values > values.min()).double())
    # Different noise for m and r, for neighbours, and for neighbouring seeds: correlations are those of chance.
    for one, other in [(ups[0], ups[1]), (ups[0][:, 1:], ups[0][:, :-1]), (ups[0][1:], ups[0][:-1])]:
        correlation = torch.corrcoef(torch.stack([one.reshape(-1), other.reshape(-1)]))[0, 1]
        assert abs(float(correlation)) < 5 / (seeds * size) ** 0.5 * 1.05


def test_elements_beyond_two_to_the_31():
    """A row table that claims 2^31 + 1,050 elements, of which only the last 1,050 exist and are worked on."""
    chunk = 2**31 // kernel.BLOCK
    before = Problem.of((1050,), **by_place(DTYPES[0]))
    for aligned, elements in ((True, 1040), (False, 1050)):
        after = before.clone()
        columns = _columns(after)
        row = [column[0].data_ptr() - 4 * 2**31 for column in columns]
        kernel.s3_step[(2,)](
            torch.tensor([(chunk + i) << 32 for i in range(2)]),
            torch.tensor([*row, 0, 2**31 + elements]),
            **_arguments(),
            ALIGNED=aligned,
            TOGETHER=True,
        )
        begin, end = (Problem(*([x[0][:elements]] for x in _columns(y)), settings=y.settings) for y in (before, after))
        check(begin, end)
        for x, y in zip(_columns(before), columns, strict=True):
            assert torch.equal(x[0][elements:], y[0][elements:])


def _columns(problem):
    return problem.params, problem.grads, problem.exp_avgs, problem.exp_avg_roots


def _arguments():
    """The kernel's arguments for Problem's defaults, written out once more."""
    none = dict.fromkeys(["lr_pointer", "factor", "found_inf", "statistics", "seed", "MODEL"])
    numbers = {"sign": 1.0, "lr": 0.125, "beta1": 0.95, "beta2": 0.95, "p": 3.0}
    numbers |= {"one_minus_beta1": 0.05, "one_minus_beta2": 0.05}
    numbers |= {"inverse_p": 1 / 3, "bound": 1.0, "weight_decay": 0.25, "tau": 1.0}
    float32 = launch.DTYPES[F32]
    forms = {"PARAM": float32, "GRAD": float32, "STATE": float32, "FORM": 3, "NESTEROV": True, "BLOCK": kernel.BLOCK}
    return none | numbers | forms


def test_thousands_of_tensors_need_two_launches(monkeypatch):
    """And a step on the same tensors builds no new table."""
    tables = []
    find = launch._tables.find
    monkeypatch.setattr(launch._tables, "find", lambda *call: tables.append(find(*call)) or tables[-1])
    problem = Problem.of([1 + i % 5 for i in range(40)], **by_place(DTYPES[0]))
    hyper = problem.settings
    for _ in range(2):
        triton.s3_step_(problem.params, problem.grads, problem.exp_avgs, problem.exp_avg_roots, **hyper)
    assert tables[0] is tables[1]
    assert len(tables[0].launches) == 1  # all too short for vectors


def test_nothing_to_do():
    triton.s3_step_([], [], [], [], **Problem.of((), **by_place(DTYPES[0])).settings)
    empty = Problem.of((0, 0), **by_place(DTYPES[0]))
    check(empty, empty.step())
