"""Where commands write."""

from rich.console import Console

console = Console()
errors = Console(stderr=True)


def line(text: str) -> None:
    """Print ``text`` as it is: a line to be pasted must not be broken where the terminal ends."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
