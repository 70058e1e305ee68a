"""The demonstration: a real corpus, two GPT-2 runs through Megatron, a kill, a resume, and a comparison.

Started by ``make demo`` or ``python -m s3_megatron.demo``.
"""
