"""Floor 0: arithmetic. Knows no model."""
