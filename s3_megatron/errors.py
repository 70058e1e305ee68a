"""The one exception this package raises for mistakes a user can mend."""


class S3Error(ValueError):
    """A wrong value from outside: its text names the value, what is allowed, and the fix, in one line."""


def first_line(error: Exception) -> str:
    """An error in one line: its first, or its kind where it has no text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
