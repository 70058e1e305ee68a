"""What ptxas made of the kernel, read from its machine code by the tools of Triton's wheel: no GPU is needed.

PTX shows the accesses, and not where they end up: ptxas moves loads down behind arithmetic to save registers, and
fewer bytes are then under way while a program waits.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,5}\*/\s+(.*?);", re.MULTILINE)
_VECTOR_LOAD = re.compile(r"\bLDG\.E(?:\.[A-Z0-9_]+)*?\.(128|256)\b\S*\s+(?:P\d, )?R(\d+)")


def dump(cubin: bytes, *options: str) -> str:
    """Return what Triton's cuobjdump prints of compiled code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), *options, file.name], check=True, capture_output=True)
    return done.stdout.decode(errors="replace")


def instructions(cubin: bytes) -> list[str]:
    """List a kernel's instructions, without what fills it up behind its end."""
    found = _INSTRUCTION.findall(dump(cubin, "-sass"))
    while found and (found[-1].startswith("NOP") or found[-1].startswith("BRA")):
        found.pop()
    return found


def loads_before_a_wait(listed: list[str]) -> tuple[int, int]:
    """Count the vector loads that are issued before the first instruction that needs one's value, and all of them."""
    loads = []
    for index, instruction in enumerate(listed):
        if match := _VECTOR_LOAD.search(instruction):
            first, count = int(match[2]), int(match[1]) // 32
            loads.append((index, set(range(first, first + count))))
    waits = [_first_use(listed, index, registers) for index, registers in loads]
    first_wait = min(waits, default=0)
    return sum(index < first_wait for index, _ in loads), len(loads)


def _first_use(listed: list[str], start: int, registers: set[int]) -> int:
    for index in range(start + 1, len(listed)):
        operands = {int(number) for number in re.findall(r"\bR(\d+)\b", listed[index])}
        if operands & registers:
            return index
    return len(listed)
