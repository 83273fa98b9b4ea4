"""Floor 2: the same Llama, smaller."""
