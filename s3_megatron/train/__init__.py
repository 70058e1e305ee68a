"""What torchrun starts."""
