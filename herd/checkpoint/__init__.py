"""Floor 3: where weights live."""
