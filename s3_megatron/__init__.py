"""S3 (SoftSignSGD, arXiv 2507.06464) for Megatron-LM and DeepSpeed: an optimizer, not Amazon's storage."""

__version__ = "0.1.0"
