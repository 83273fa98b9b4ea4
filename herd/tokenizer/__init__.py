"""Floor 1: text <-> token ids. No torch."""
