"""Proof on a GPU: ``python -m benchmarks.gpu``, which ``make gpu`` starts.

What runs on a machine that may have no network and none of this project's packages but torch, Triton, pytest, numpy,
scipy, rich, psutil and transformers; ``.whl/`` carries the rest.
"""
