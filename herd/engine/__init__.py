"""Floor 4: running. Token ids in, token ids out."""
