"""Is it better? Many small training runs of several optimizers, tuned alike, and what they show (docs/evidence.md)."""
