"""SoftMuon's map and its reference: golden values, every shape and rank, bounds of the rule for steps and precision."""

import math

import pytest
import torch

from s3_megatron.errors import S3Error
from s3_megatron.optim.polar import COARSE, LONGEST, SHORTEST, direction, joined, pieces, plan, polar, soft_polar
from s3_megatron.optim.softmuon_reference import softmuon_map

M = [[1, 2], [-1, 0.5], [0, 3]]
SMALL = [[0.03, -0.01], [0.02, 0.04], [-0.05, 0.01]]
GOLDEN = [  # matrix, tau, the map to 12 decimals
    (M, 1.0, "0.505508842141 0.494429783202 -0.613131321532 0.177418685496 -0.129146975270 0.806218162438"),
    (M, 0.1, "0.097676199659 0.187276924893 -0.099358590164 0.047660426476 -0.002018868606 0.281924821642"),
    (M, 10.0, "0.613557682730 0.500529060788 -0.764929829537 0.200818338600 -0.181646576168 0.841616879266"),
    (M, 1e9, "0.615077024295 0.500545935520 -0.767078714519 0.201137328992 -0.182402028268 0.842019917413"),
    (
        SMALL,
        10.0,
        ".255376959227625 -.092057461789832 .17025130615175 .368229847159329 -.425628265379374 .092057461789832",
    ),
    (
        SMALL,
        50.0,
        ".462910049886276 -.21320071635561 .308606699924184 .852802865422442 -.77151674981046 .21320071635561",
    ),
    (
        SMALL,
        math.inf,
        ".486664263392288 -.235702260395516 .324442842261525 .942809041582063 -.811107105653813 .235702260395516",
    ),
]
GOLD = pytest.mark.parametrize(("matrix", "tau", "row"), GOLDEN)


def expected(row):
    return torch.tensor([float(x) for x in row.split()], dtype=torch.float64).view(3, 2)


@GOLD
def test_the_reference_gives_the_golden_values(matrix, tau, row):
    """To 1e-12: they are printed to 12 decimals."""
    torch.testing.assert_close(
        softmuon_map(torch.tensor(matrix, dtype=torch.float64), tau), expected(row), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("matrix", "tau", "row"), [case for case in GOLDEN if case[1] < math.inf])
@pytest.mark.parametrize("wide", [False, True])
def test_the_map_gives_the_golden_values(matrix, tau, row, wide):
    """To 2e-6: eight steps of products in float32 of numbers up to 1, each rounded by 6e-8; the first polynomial has
    factors up to 23."""
    x = torch.tensor(matrix)
    found = soft_polar(x.mT.contiguous(), tau, SHORTEST).mT if wide else soft_polar(x, tau, SHORTEST)
    torch.testing.assert_close(found.double(), expected(row), rtol=0, atol=2e-6)


def made(rows, cols, values):
    """A float32 matrix with these singular values."""
    generator = torch.Generator().manual_seed(rows)
    sides = [
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64))[0] for n in (rows, cols)
    ]
    return ((sides[0] * values.double()) @ sides[1].mT).float()


SPECTRA = {  # of 32 values, the largest 1
    "one size": torch.ones(32),
    "condition 1e2": torch.logspace(0, -2, 32),
    "condition 1e4": torch.logspace(0, -4, 32),
    "condition 1e6": torch.logspace(0, -6, 32),
    # Frobenius norm far above the largest value: 8 steps that reach 1e-3 of the norm do not reach 1e-3 of the value.
    "two sizes": torch.where(torch.arange(32) < 24, 1.0, 1e-6),
    "rank 5": torch.where(torch.arange(32) < 5, 1.0, 0.0),
}


def error(found, matrix, tau):
    """Frobenius norm of the difference, relative to the map's."""
    exact = softmuon_map(matrix.double(), tau)
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32)])
@pytest.mark.parametrize("name", SPECTRA)
def test_float32_keeps_its_bound_with_the_planned_steps(name, shape):
    """1e-4 up to tau 1e3 whatever the spectrum, and 1e-3 at any tau where no singular value is below 1e-4 of the
    largest: products in float32 resolve them to a few 1e-7 of it. Below that nothing bounds the small ones but 1.

    Incident: 8 steps were enough for tau 1e3 in matrices of 64 columns and had 4e-3 in those of 256: what counts is
    tau times the Frobenius norm, which the plan goes by. It is the norm of the first soft step, and holds for matrices
    that have grown to four times that."""
    values = SPECTRA[name]
    matrix = made(*shape, values)
    norm = matrix.norm().item()
    for tau in (1e-3, 1.0, 10.0, 100.0, 1e3, 1e4, 1e6, 1e9):
        steps, _ = plan(tau, norm / 4, 1.0)
        assert SHORTEST <= steps <= LONGEST and (steps == SHORTEST or tau > 10)
        found = soft_polar(matrix, tau, steps)
        if tau <= 1e3 or values.min() >= 1e-4:
            assert error(found, matrix, tau) <= (1e-4 if tau <= 1e3 else 1e-3), (tau, steps)
        assert torch.linalg.matrix_norm(found.double(), 2) <= 1 + 1e-5, tau
    if 0 < values.min() < 1e-2:
        assert error(soft_polar(matrix, 1e4, SHORTEST), matrix, 1e4) > 1e-3, "a plan is needed"


@pytest.mark.parametrize("name", SPECTRA)
def test_bfloat16_keeps_its_bound_where_the_plan_takes_it(name):
    """2e-2: bfloat16 rounds by 2^-9, and a matrix's smallest planned value is 1/8 of its largest."""
    matrix = made(48, 32, SPECTRA[name])
    for tau in (0.01, 1.0, 3.0, COARSE):
        steps, precision = plan(tau, matrix.norm().item(), 1.0)
        assert precision == "medium"
        found = soft_polar(matrix, tau, steps, precision)
        assert 1e-4 < error(found, matrix, tau) <= 2e-2, "that it was bfloat16 shows"
        assert torch.linalg.matrix_norm(found.double(), 2) <= 1 + 1e-2
    assert plan(COARSE + 1, 1.0, 1.0)[1] == "highest"


def test_a_plan_for_sizes_that_are_not_known_yet_is_the_safe_one():
    assert plan(1e9, math.inf, math.inf) == (LONGEST, "highest")
    assert plan(1.0, 0.0, 0.0) == (SHORTEST, "medium")


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_matrix_and_temperature_scale_together(scale):
    """The map depends on tau*M alone. Incident: the iteration divides by a norm of at least 1e-7, and gradients of 1e-9
    gave a hundredth of the step, in the soft phase and in Muon's own alike."""
    matrix = made(12, 8, torch.logspace(0, -2, 8))
    one = soft_polar(matrix, 30.0)
    torch.testing.assert_close(soft_polar(matrix * scale, 30.0 / scale), one, rtol=0, atol=1e-5)
    hard = polar(matrix, 5, "quintic", "highest")
    torch.testing.assert_close(polar(matrix * scale, 5, "quintic", "highest"), hard, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (5, 9), (9, 5)])
def test_vectors_and_zeros(shape):
    """A row or column goes to tau*s/sqrt(1+(tau*s)^2) along itself; nothing goes to nothing."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert error(soft_polar(x, 2.0), x, 2.0) <= 1e-5
    for tau in (1e-3, 1.0, 1e9):
        assert torch.equal(soft_polar(torch.zeros(shape), tau), torch.zeros(shape))
    assert torch.equal(polar(torch.zeros(shape), 5, "quintic", "medium"), torch.zeros(shape))


def test_a_stack_is_its_matrices():
    """To 1e-5: other kernels for a stack, the same arithmetic."""
    stack = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-6, 1e6]).view(
        3, 1, 1
    )
    for one, matrix in zip(soft_polar(stack, 50.0), stack, strict=True):
        torch.testing.assert_close(one, soft_polar(matrix, 50.0), rtol=0, atol=1e-5)


def test_whatever_precision_the_process_has_the_map_has_its_own():
    """Incident: newton_schulz is bfloat16 throughout where a program has set torch's products to "medium", as Megatron
    does, and under autocast; and it raises where a program has used torch's newer fp32_precision."""
    matrix = made(12, 8, torch.logspace(0, -2, 8))
    one = soft_polar(matrix, 30.0)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(soft_polar(matrix, 30.0), one)
        assert torch.get_float32_matmul_precision() == "medium"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(soft_polar(matrix, 30.0), one)
        torch.set_float32_matmul_precision("highest")
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            assert torch.equal(soft_polar(matrix, 30.0), one)
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("tau", [-1.0, 0.0, math.nan, math.inf, -math.inf])
def test_a_temperature_out_of_range_is_refused(tau):
    with pytest.raises(S3Error, match=f"tau is {tau}: it must be a finite number > 0") as caught:
        soft_polar(torch.ones(2, 2), tau)
    assert "\n" not in str(caught.value)


def test_qkv_is_split_per_head_group_and_put_together_again():
    qkv, groups = (4, 2, 2), 3
    weight = torch.arange(24.0 * 5).view(24, 5)
    parts = pieces(weight, qkv)
    assert [list(p.shape) for p in parts] == [[12, 5], [6, 5], [6, 5]]
    assert torch.equal(parts[0], torch.cat([weight[8 * i : 8 * i + 4] for i in range(groups)]))
    assert torch.equal(parts[2], torch.cat([weight[8 * i + 6 : 8 * i + 8] for i in range(groups)]))
    assert torch.equal(joined(parts, qkv), weight)


@pytest.mark.parametrize("soft", [None, (5.0, 8, "highest"), (5.0, 8, "medium")])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("qkv", [None, (2, 1, 1)])
def test_one_entry_that_is_not_finite_makes_its_whole_matrix_nan(soft, bad, qkv):
    group = {"num_ns_steps": 5, "coefficient_type": "quintic", "fp32_matmul_prec": "medium"}
    group |= {"scale_mode": "spectral", "extra_scale_factor": 1.0}
    matrix = torch.randn(8, 3)
    matrix[1, 2] = bad
    assert direction(matrix, soft, group, qkv).isnan().all()
    if qkv is None:
        stack = torch.stack([torch.randn(8, 3), matrix])
        out = direction(stack, soft, group, qkv)
        assert out[1].isnan().all() and out[0].isfinite().all()
