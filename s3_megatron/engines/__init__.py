"""S3 inside the hosts that shard it."""
