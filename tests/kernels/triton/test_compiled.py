"""The kernel compiled ahead of time for GPUs that are not here: what its instructions move, and what they spill."""

import re

import pytest

pytest.importorskip("triton")

from s3_megatron.kernels.triton import kernel, sass
from s3_megatron.kernels.triton.audit import TARGETS, Layout, accesses, audit, compiled, resources

EVERY_INPUT = ("lr_pointer", "factor", "found_inf", "statistics", "seed")
LAYOUTS = [
    Layout(),
    Layout(grad="bfloat16", state="bfloat16", model="bfloat16"),
    Layout(grad="float16", model="float16"),
    Layout("bfloat16", "bfloat16", "bfloat16"),
    Layout("float16", "float16", "float32", inputs=EVERY_INPUT),
    Layout(state="bfloat16", model="bfloat16", inputs=EVERY_INPUT),
]
FORMS = [Layout(p=1), Layout(p=2, nesterov=False), Layout(p=1.5, inputs=()), Layout(p=1.5, inputs=EVERY_INPUT)]
SOFTSIGNUM = [
    Layout(softsignum="hard", nesterov=False, inputs=()),
    Layout(softsignum="soft"),
    Layout(softsignum="soft", state="bfloat16", model="bfloat16", inputs=EVERY_INPUT),
    Layout("bfloat16", "bfloat16", "bfloat16", softsignum="hard"),
]
ONE_OF_EACH_MAKER = ("sm_90", "gfx942")
# Every target in the layouts of all engines; every form on one of each maker. `make test-fast` compiles for these two.
ROWS = [
    pytest.param(target, layout, marks=() if target in ONE_OF_EACH_MAKER else pytest.mark.slow)
    for target in TARGETS
    for layout in LAYOUTS
]
ROWS += [(target, layout) for target in ONE_OF_EACH_MAKER for layout in (*FORMS, *SOFTSIGNUM)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A fresh cache: what is audited was compiled from these sources."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize(("target", "layout"), ROWS)
def test_memory_is_touched_once_and_in_vectors(target, layout):
    """x, g, m, r in, x, m, r and the model's weight out: 28 bytes an element where all is float32, 20 without r."""
    (row,) = audit([target], [layout])
    assert (row.loaded, row.stored) == (row.least_loaded, row.least_stored)
    assert (row.narrowest, row.widest) == (128, 128)
    assert row.spilled == 0
    # 65,536 registers, 128 threads a program: at least 5 programs a multiprocessor, each with up to 16 KiB under way,
    # where latency times bandwidth asks for about 20 KiB (H100: 3.35 TB/s, 132 multiprocessors, 700 ns).
    assert row.registers <= 96
    # All of that is under way only where the loads are issued before the first wait for one of them. Left to ptxas,
    # 2 of 8 were, and the other six one by one behind arithmetic.
    assert row.together >= 0.75 * row.loads
    assert (row.loads == row.loaded * kernel.ELEMENTS_PER_THREAD / 16) or target == "gfx942"


@pytest.mark.parametrize(
    "layout",
    [*(Layout(p=p, inputs=()) for p in (3, 1.5)), *(Layout(softsignum=x, inputs=()) for x in ("soft", "hard"))],
)
def test_arithmetic_takes_less_time_than_memory_on_paper(layout):
    """p=1.5 went through two logarithms and two powers: 1,552 instructions, 6.6 ms of 10^9 weights on an H200, whose
    memory takes 6.5. An H200 issues four instructions of 32 threads a clock on 132 multiprocessors at 1.755 GHz, and
    copies at 4.3 TB/s; half of the memory's time is left for what paper does not know."""
    (row,) = audit(["sm_90"], [layout])
    issued = 10**9 / (32 * kernel.ELEMENTS_PER_THREAD) * row.instructions / (132 * 4 * 1.755e9)
    assert issued < 0.5 * 10**9 * sum(layout.least) / 4.3e12


def test_a_load_that_has_moved_down_is_seen():
    """The check above can fail: addresses are no values, a predicate is no operand, and what waits is any use."""
    early = ["LDG.E.128.STRONG.SYS R4, [R2.64]", "@!P0 LDG.E.128 R8, [R2.64+0x10]", "IADD3 R20, R12, R2, RZ"]
    assert sass.loads_before_a_wait([*early, "FADD R1, R11, R0"]) == (2, 2)
    assert sass.loads_before_a_wait([early[0], "FMUL R0, R7, R7", *early[1:]]) == (1, 2)
    assert sass.loads_before_a_wait(["LDG.E.64 R4, [R2]", "FADD R1, R4, R4", early[0]]) == (1, 1), "uniform ones apart"
    assert sass.loads_before_a_wait([]) == (0, 0)


def test_the_least_is_what_the_formula_says():
    assert sum(Layout().least) == 28
    assert sum(Layout(model="bfloat16").least) == 30
    assert sum(Layout(grad="bfloat16", state="bfloat16", model="bfloat16").least) == 20
    assert sum(Layout("bfloat16", "bfloat16", "bfloat16").least) == 14
    assert sum(Layout(softsignum="soft").least) == 20
    assert sum(Layout(grad="bfloat16", state="bfloat16", model="bfloat16", softsignum="hard").least) == 16


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_without_alignment_nothing_is_a_vector(target):
    """The check above can fail: the same bytes, one element at a time."""
    (row,) = audit([target], [Layout(grad="bfloat16", aligned=False)])
    assert (row.loaded, row.stored) == (row.least_loaded, row.least_stored)
    assert (row.narrowest, row.widest) == (16, 32)


def test_a_spill_is_seen():
    """Too few registers on purpose."""
    assert resources(compiled(TARGETS["sm_90"], Layout(p=1.5), maxnreg=24))[1] > 0


def test_an_access_too_many_is_seen():
    target = TARGETS["sm_90"]
    ptx = compiled(target, Layout()).asm["ptx"]
    loads, stores = accesses(target, ptx)
    assert loads == [16] * 8 and stores == [16] * 6
    assert ".local" not in ptx
    more = ptx + "\tld.local.b32 %r9, [%SPL];\n\t@%p1 st.global.L1::evict_last.v2.b32 [ %rd9 + 0 ], { %r1, %r2 };\n"
    assert accesses(target, more) == ([*loads, 4], [*stores, 8])
    amd = compiled(TARGETS["gfx942"], Layout()).asm["amdgcn"] + "\tscratch_load_dword v1, off, off\n"
    assert accesses(TARGETS["gfx942"], amd)[0] == [16] * 8 + [4]


def test_bfloat16_is_rounded_to_nearest_even():
    """The interpreter cannot show it (see exact_conversions): the instruction does. AMD's gfx942 has none; there the
    compiler adds half an ulp less one, plus the last bit."""
    layout = Layout(grad="bfloat16", state="bfloat16", model="bfloat16")
    for target in ("sm_80", "sm_90", "sm_100"):
        assert "cvt.rn.bf16x2.f32" in compiled(TARGETS[target], layout).asm["ptx"]
    assert "0x7fff" in compiled(TARGETS["gfx942"], layout).asm["amdgcn"]


def test_nothing_that_changes_is_compiled_in():
    """Triton compiles a number anew where it becomes 1 or a multiple of 16, a pointer where its alignment changes."""
    special = [x.name for x in kernel.s3_step.params if not x.is_constexpr and not x.do_not_specialize]
    assert not special


def test_denormals_are_not_flushed():
    """m and r of faded weights are denormal, and the powers of two that scale them reach 2^-126."""
    for layout in (Layout(), Layout(softsignum="soft"), Layout(softsignum="hard")):
        assert ".ftz" not in compiled(TARGETS["sm_90"], layout).asm["ptx"]
    # The square root of p = 1.5 takes numbers between 0 and 2, of which a denormal one adds nothing to the other term.
    flushing = re.findall(r"\w+\.[\w.]*ftz[\w.]*", compiled(TARGETS["sm_90"], Layout(p=1.5)).asm["ptx"])
    assert set(flushing) <= {"sqrt.approx.ftz.f32"}
    assert "float_denorm_mode_32 3" in compiled(TARGETS["gfx942"], Layout()).asm["amdgcn"]
