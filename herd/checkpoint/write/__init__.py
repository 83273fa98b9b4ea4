"""The other direction: checkpoints written in every format, one tensor in memory at a time."""
