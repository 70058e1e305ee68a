"""Proof on a GPU: ``python -m benchmarks.gpu``, which ``make gpu`` starts.

What runs on a machine that may have no network and whose Python has torch, numpy and Triton alone; ``.whl/`` carries
the rest, and until it is unpacked nothing but Python is needed.
"""
