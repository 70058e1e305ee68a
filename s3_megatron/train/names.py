"""What Megatron's arguments are called on the command line."""


def flag_of(name: str) -> str:
    """Give the flag of the argument ``name``."""
    return f"--{name.replace('_', '-')}"
