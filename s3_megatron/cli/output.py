"""Where commands write."""

from rich.console import Console

console = Console()
errors = Console(stderr=True)


def line(text: str) -> None:
    """Print ``text`` as it is: a line to be pasted must not be broken where the terminal ends."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """``text`` with bytes that are no UTF-8, as a file's name may have, escaped: no terminal takes them."""
    return text.encode(errors="backslashreplace").decode()
