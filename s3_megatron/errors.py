"""The one exception this package raises for mistakes a user can mend."""


class S3Error(ValueError):
    """A wrong value from outside: its text names the value, what is allowed, and the fix, in one line."""
