"""The demonstration: a real corpus, GPT-2 runs through Megatron or DeepSpeed, a kill, a resume, and a comparison.

Started by ``make demo`` or ``python -m s3_megatron.demo``.
"""
