"""S3 itself: the optimizer, and Algorithm 1 for readers; and SoftSignum, its relative."""

from s3_megatron.optim.s3 import S3
from s3_megatron.optim.softsignum import SoftSignum
from s3_megatron.optim.state import EXP_AVG, EXP_AVG_ROOT, from_adam_state, is_s3_state

__all__ = ["EXP_AVG", "EXP_AVG_ROOT", "S3", "SoftSignum", "from_adam_state", "is_s3_state"]
