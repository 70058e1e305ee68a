"""What the GPU kernel reads, writes and holds, counted in the code compiled for four GPUs."""

from dataclasses import asdict
from datetime import date
from importlib import metadata
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from s3_megatron.kernels.triton.audit import Row


_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def rows() -> list["Row"]:
    """Compile the variants that matter, for every target: a minute."""
    from s3_megatron.kernels.triton.audit import TARGETS, Layout, audit

    layouts = [
        Layout(),
        Layout(state="bfloat16"),
        Layout(grad="bfloat16", model="bfloat16"),
        Layout(grad="bfloat16", state="bfloat16", model="bfloat16"),
        Layout(param="bfloat16", grad="bfloat16", state="bfloat16"),
        Layout(p=1.5),
        Layout(aligned=False),
        Layout(softsignum="hard", nesterov=False),
        Layout(softsignum="soft", nesterov=False),
        Layout(softsignum="soft", nesterov=False, grad="bfloat16", state="bfloat16", model="bfloat16"),
    ]
    return audit(TARGETS, layouts)


def table(rows: list["Row"]) -> Table:
    """Lay the rows out for a terminal."""
    table = Table(
        title="bytes an element, and what a thread holds",
        title_justify="left",
        caption="types: weight, gradient, states, model's weight; hard and soft: SoftSignum; access in bits; "
        "together: vector loads before a wait",
        caption_justify="left",
        box=None,
    )
    for heading in ("GPU", "types", "p", "aligned"):
        table.add_column(heading, no_wrap=True)
    for heading in ("loads", "stores", "least", "access", "registers", "spilled", "instructions", "together"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        layout = row.layout
        types = [_SHORT[name] for name in (layout.param, layout.grad, layout.state, layout.model) if name]
        table.add_row(
            *(row.target, " ".join(types), layout.softsignum or f"{layout.p:g}", "yes" if layout.aligned else "no"),
            *(f"{row.loaded:g}", f"{row.stored:g}", f"{row.least_loaded + row.least_stored}"),
            f"{row.narrowest}" if row.narrowest == row.widest else f"{row.narrowest}-{row.widest}",
            *(f"{row.registers}", f"{row.spilled}"),
            f"{row.instructions}" if row.instructions else "-",
            f"{row.together} of {row.loads}" if row.loads else "-",
        )
    return table


def as_json(rows: list["Row"], command: str) -> dict[str, Any]:
    """Return the rows as they are stored, with the version that compiled them."""
    made = {"date": date.today().isoformat(), "triton": metadata.version("triton")}
    return {"command": command, **made, "rows": [asdict(row) for row in rows]}
