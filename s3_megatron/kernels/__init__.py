"""Fast forms of the one update rule; each is held to ``optim/reference.py``."""
