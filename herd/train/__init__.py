"""Floor 5: learning."""
