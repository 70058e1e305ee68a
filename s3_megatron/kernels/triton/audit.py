"""What the compiled kernel reads, writes and holds in registers, from its assembly: no GPU is needed.

Bytes are those of the instructions of one block over its elements. The few uniform loads of a program (its table
entries, lr, factor, found_inf) are not counted: 64 bytes to 1,024 elements.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from s3_megatron.kernels.call import ROLES, Kind, form
from s3_megatron.kernels.triton import kernel, sass
from s3_megatron.kernels.triton.launch import options

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
_POINTERS = {
    "work": "*i64",
    "rows": "*i64",
    "lr_pointer": "*fp32",
    "factor": "*fp32",
    "found_inf": "*fp32",
    "statistics": "*fp64",
    "seed": "*i64",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """One compiled variant: dtypes by torch's names, the form of p, and the optional inputs by name.

    Where ``softsignum`` names a phase, "soft" or "hard", it is a step of SoftSignum, which has no p.
    """

    param: str = "float32"
    grad: str = "float32"
    state: str = "float32"
    model: str | None = None
    p: float = 3.0
    nesterov: bool = True
    aligned: bool = True
    inputs: tuple[str, ...] = ("factor", "found_inf")
    softsignum: Literal["soft", "hard"] | None = None

    @property
    def form(self) -> int:
        """The kernel's formulas."""
        forms = {"soft": kernel.SOFT, "hard": kernel.HARD}
        return form(self.p) if self.softsignum is None else int(forms[self.softsignum].value)

    @property
    def least(self) -> tuple[int, int]:
        """Bytes an element that any implementation loads and stores."""
        root = self.state if self.softsignum is None else None
        dtypes: dict[Kind, str | None] = {"weight": self.param, "gradient": self.grad, "m": self.state, "r": root}
        dtypes["model weight"] = self.model
        sizes = {kind: _ITEM_SIZES[dtype] for kind, dtype in dtypes.items() if dtype}
        loaded = sum(size for kind, size in sizes.items() if ROLES[kind] != "out")
        return loaded, sum(size for kind, size in sizes.items() if ROLES[kind] != "in")


@dataclass(frozen=True, slots=True)
class Row:
    """What one variant does on one target; ``narrowest`` is the smallest access in bits, ``spilled`` in bytes.

    NVIDIA's only: a thread's ``instructions``, its vector ``loads``, and how many of them are issued before it waits
    for one (``together``). 0 on AMD's, where none of them is read from the machine code.
    """

    target: str
    layout: Layout
    loaded: float
    stored: float
    least_loaded: int
    least_stored: int
    narrowest: int
    widest: int
    registers: int
    spilled: int
    shared: int
    instructions: int
    loads: int
    together: int


def audit(targets: Iterable[str] = TARGETS, layouts: Iterable[Layout] = (Layout(),)) -> list[Row]:
    """Compile every layout for every target (names of ``TARGETS``) ahead of time and read the assembly."""
    layouts = list(layouts)
    return [_row(target, layout) for target in targets for layout in layouts]


def compiled(target: GPUTarget, layout: Layout, **extra: int) -> triton.compiler.CompiledKernel:
    """Compile one variant as a launch does, plus ``extra`` options of Triton's; numbers are float32 run-time values."""
    constants = {
        "PARAM": getattr(tl, layout.param),
        "GRAD": getattr(tl, layout.grad),
        "STATE": getattr(tl, layout.state),
        "MODEL": getattr(tl, layout.model) if layout.model else None,
        "FORM": layout.form,
        "NESTEROV": layout.nesterov,
        "ALIGNED": layout.aligned,
        "TOGETHER": target.backend == "cuda",
        "BLOCK": kernel.BLOCK,
    }
    signature = {}
    for name in kernel.s3_step.arg_names:
        pointer = _POINTERS.get(name)
        if pointer and name not in (*layout.inputs, "work", "rows"):
            constants[name] = None
        signature[name] = "constexpr" if name in constants else pointer or "fp32"
    source = ASTSource(kernel.s3_step, signature, constants)
    return triton.compile(source, target=target, options=options(target.warp_size) | extra)


def accesses(target: GPUTarget, assembly: str) -> tuple[list[int], list[int]]:
    """Return the bytes a thread moves with each load and each store of tensor elements."""
    found = list(_ptx_accesses(assembly) if target.backend == "cuda" else _amd_accesses(assembly))
    return [size for kind, size in found if kind == "load"], [size for kind, size in found if kind == "store"]


def resources(built: triton.compiler.CompiledKernel) -> tuple[int, int]:
    """Return registers a thread and the bytes of memory a thread spills to."""
    return _cuda_resources(built.asm["cubin"]) if "cubin" in built.asm else _amd_resources(built.asm["amdgcn"])


def _row(name: str, layout: Layout) -> Row:
    target = TARGETS[name]
    built = compiled(target, layout)
    cuda = target.backend == "cuda"
    loads, stores = accesses(target, built.asm["ptx" if cuda else "amdgcn"])
    registers, spilled = resources(built)
    listed = sass.instructions(built.asm["cubin"]) if cuda else []
    together, vector_loads = sass.loads_before_a_wait(listed)
    least_loaded, least_stored = layout.least
    return Row(
        target=name,
        layout=layout,
        loaded=sum(loads) / kernel.ELEMENTS_PER_THREAD,
        stored=sum(stores) / kernel.ELEMENTS_PER_THREAD,
        least_loaded=least_loaded,
        least_stored=least_stored,
        narrowest=8 * min(loads + stores),
        widest=8 * max(loads + stores),
        registers=registers,
        spilled=spilled,
        shared=built.metadata.shared,
        instructions=len(listed),
        loads=vector_loads,
        together=together,
    )


def _ptx_accesses(assembly: str) -> Iterable[tuple[str, int]]:
    """Find PTX's global accesses; local ones count too, so that a spill shows as too many bytes."""
    arguments = set(re.findall(r"ld\.param\.b64\s+(%rd\d+)", assembly))
    pattern = r"\b(ld|st)\.(?:volatile\.)?(?:global|local)[\w:.]*?(?:\.v(\d))?\.[bfus](\d+)\s(.*)"
    for kind, vector, bits, operands in re.findall(pattern, assembly):
        address = re.search(r"\[\s*(%rd\d+)", operands)
        # Uniform: 64-bit scalars are table entries and the seed, a bare argument is lr, factor or found_inf.
        if kind == "ld" and ((bits == "64" and not vector) or (address and address[1] in arguments)):
            continue
        yield ("load" if kind == "ld" else "store"), int(vector or 1) * int(bits) // 8


def _amd_accesses(assembly: str) -> Iterable[tuple[str, int]]:
    """Find the vector accesses of AMD's instruction set; uniform loads go through the scalar unit or ``global``."""
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}
    for kind, name in re.findall(r"\b(?:buffer|scratch)_(load|store)_(dwordx\d|[a-z]+)", assembly):
        yield kind, sizes[name]


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Return registers a thread and bytes of stack and local memory, from the cuobjdump of Triton's wheel."""
    found = re.findall(r"(REG|STACK|LOCAL):(\d+)", sass.dump(cubin, "--dump-resource-usage"))
    values = {name: int(value) for name, value in found}
    return values["REG"], values["STACK"] + values["LOCAL"]


def _amd_resources(assembly: str) -> tuple[int, int]:
    """Return vector registers a thread and bytes of scratch memory, from the metadata in the assembly."""
    values = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)", assembly)}
    return values["vgpr_count"], values["private_segment_fixed_size"] + 4 * values["vgpr_spill_count"]
