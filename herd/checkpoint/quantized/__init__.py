"""Checkpoints that other tools quantized: one module for each form, and a table that recognises them."""
