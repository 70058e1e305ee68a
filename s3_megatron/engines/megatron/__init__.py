"""``--optimizer s3`` inside megatron-core."""

from s3_megatron.engines.megatron.bridge import S3OptimizerConfig, SoftMuonOptimizerConfig, SoftSignumOptimizerConfig
from s3_megatron.engines.megatron.install import install, uninstall

__all__ = ["S3OptimizerConfig", "SoftMuonOptimizerConfig", "SoftSignumOptimizerConfig", "install", "uninstall"]
