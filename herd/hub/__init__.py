"""Where checkpoints come from: downloads and the caches that tools share. No torch."""
