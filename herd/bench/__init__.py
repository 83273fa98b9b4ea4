"""Measuring: how fast herd is on this machine, against what the machine can do at all, and beside other programs."""
