"""Checkpoints of both engines as files: which are whole. Imports no torch: login nodes and the node agent read them."""
