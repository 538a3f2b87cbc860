"""Scripts that measure what the README claims; each prints its figures beside a yardstick of the same run."""
