"""Runs that can be started with `python -m herd.train.recipes.NAME`."""
