"""Floor 1: what a Llama is. No files, no processes, no text.

`config` and `presets` import no torch, so that the catalog opens in milliseconds.
"""
