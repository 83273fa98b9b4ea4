"""Floor 1: messages <-> token ids, and the protocols through which upper floors see a model. No torch."""
