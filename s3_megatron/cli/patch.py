"""The commands that put S3 into a checkout of a host, and take it out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from s3_megatron.cli.output import errors, line, report
from s3_megatron.finding import OK

if TYPE_CHECKING:
    from s3_megatron.patch.place import Place
    from s3_megatron.patch.release import Release

app = typer.Typer(
    name="patch",
    help="Three lines in your own Megatron-LM or DeepSpeed, after which it knows S3 by itself. "
    "Exit code 0: done, or so; 1: not so; 2: cannot be done or known.",
    no_args_is_help=True,
)

Where = Annotated[
    Path,
    typer.Argument(
        metavar="PATH", help="A checkout, a site-packages folder, or the folder megatron or deepspeed in it."
    ),
]
Host = Annotated[
    str | None, typer.Option("--host", metavar="HOST", help="megatron-lm or deepspeed, where PATH holds both.")
]


@app.command()
def apply(
    path: Where,
    host: Host = None,
    three_way: Annotated[
        bool,
        typer.Option("--three-way", help="Patch files that differ from the release, if ours still find their place."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the change; write nothing.")] = False,
) -> None:
    """Put our lines in; writes every file or none."""
    from s3_megatron.patch import work
    from s3_megatron.patch.place import find

    place = find(path, host)
    release = work.release_of(place)
    changes = work.patching(place, release, three_way=three_way)
    if dry_run:
        for change in changes:
            print(work.as_diff(place.root, change), end="")
    else:
        work.write(changes)
    done = "would be patched" if dry_run else "is patched"
    line(f"{place.root}: {_name(place)} {done if changes else f'is already {work.state(place, release)}'}")
    _warn(place, release)


@app.command()
def revert(path: Where, host: Host = None) -> None:
    """Take our lines out, to the byte."""
    from s3_megatron.patch import work
    from s3_megatron.patch.place import find

    place = find(path, host)
    changes = work.reverting(place, work.release_of(place))
    work.write(changes)
    line(f"{place.root}: {_name(place)} {'has our lines no more' if changes else 'is not patched'}")


@app.command()
def status(path: Where, host: Host = None) -> None:
    """Show the host, its version, and whether it is patched or changed, and where."""
    from s3_megatron.patch import work
    from s3_megatron.patch.place import find

    place = find(path, host)
    release = work.patch_for(place)
    line(f"{place.root}: {_name(place)}, {work.state(place, release) if release else 'unknown version'}")
    for text in work.differing(place, release) if release else ():
        line(f"  {text}")


@app.command()
def verify(path: Where, host: Host = None) -> None:
    """Check that our lines are there, whole, and that their Python finds S3; exit code 1 if not."""
    from s3_megatron.patch import work
    from s3_megatron.patch.edit import State
    from s3_megatron.patch.place import find

    place = find(path, host)
    release = work.release_of(place)
    state = work.state(place, release)
    good = state in (State.PATCHED, State.THREE_WAY)
    line(f"{place.root}: {_name(place)}, {state}")
    for broken in work.broken(place, release) if good else ():
        good = False
        errors.print(broken, style="red", markup=False, highlight=False, soft_wrap=True)
    good = _warn(place, release) and good
    raise typer.Exit(0 if good else 1)


@app.command()
def symbols(path: Where, host: Host = None) -> None:
    """Compare the symbols that S3 goes through with those of the nearest release; exit code 1 if any differs."""
    from s3_megatron.patch import symbols as host_symbols
    from s3_megatron.patch.place import find
    from s3_megatron.patch.release import load, nearest

    place = find(path, host)
    release = load(place.host, nearest(place.host, place.version))
    findings = host_symbols.compare(place, release)
    report(findings)
    different = sum(finding.state != OK for finding in findings)
    line(f"{place.root}: {_name(place)}, {different} of {len(findings)} symbols are not as in {release.version}")
    raise typer.Exit(1 if different else 0)


def _name(place: "Place") -> str:
    return f"{place.host} {place.version}"


def _warn(place: "Place", release: "Release") -> bool:
    """Say what may not work although it is patched; returns whether the Python of PATH finds this package."""
    from s3_megatron.patch import symbols as host_symbols
    from s3_megatron.patch import work

    if place.version != release.version:
        _print(f"{_name(place)} was never run with S3, and the patch is {release.version}'s: compare a short run")
    for finding in host_symbols.compare(place, release):
        if finding.state != OK:
            _print(
                f"{finding.name}: {finding.found} since {place.host} {release.version}; S3 goes through it: compare a "
                "short run"
            )
    python = work.python_without_us(place.root)
    if python is not None:
        _print(f"{python} does not find s3_megatron, which the patched {place.host} imports: install it there")
    return python is None


def _print(text: str) -> None:
    errors.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)
