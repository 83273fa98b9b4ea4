"""herd in a process of its own."""

from __future__ import annotations

__all__ = ["LISTENING"]

LISTENING = """\
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("herd", run_name="__main__", alter_sys=True)
"""
"""Source of a program that is herd and listens to Ctrl-C: shells start background jobs deaf to it."""
