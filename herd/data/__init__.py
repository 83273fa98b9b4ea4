"""Floor 3: records -> batches."""
