"""Trying a grammar in another process first: compiling has no fuel limit everywhere, and a thread cannot be stopped.

A schema of a few hundred characters can keep llguidance busy for minutes (several patterns that must hold at once, multiples of
many large numbers). So a new grammar is compiled by `herd.engine.grammar_child`, with a vocabulary of single bytes, and that
process is killed when it takes too long or too much memory. Only what passed is compiled here.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

from herd.errors import ConfigError

__all__ = ["GrammarTrial", "TooSlow"]

START_SECONDS = 30.0
CHILD = Path(__file__).with_name("grammar_child.py")


class TooSlow(ConfigError):
    """A grammar took too long, or so much memory that the process died."""


class GrammarTrial:
    """One process that compiles one grammar after another; it starts with the first and is replaced when it was killed.

    Calls from several threads wait for each other, without holding Python's lock.
    """

    def __init__(self, limits: dict[str, int]) -> None:
        self.limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def check(self, text: str, seconds: float) -> str | None:
        """What is wrong with the grammar `text` (as llguidance serialises it), None when it compiles. Raises TooSlow."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            answer = self._ask({"text": text, "limits": self.limits}, seconds)
        return answer["error"]

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._kill()

    def __del__(self) -> None:
        self._kill()

    def _start(self) -> None:
        spec = find_spec("llguidance")
        assert spec is not None
        assert spec.origin is not None
        folder = str(Path(spec.origin).parent.parent)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(CHILD), folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise ConfigError(f"no process can be started to compile a grammar in: {error}") from None
        self._ask({"text": '{"grammars":[{"lark_grammar":"start: \\"a\\""}]}', "limits": self.limits}, START_SECONDS)

    def _ask(self, question: dict[str, object], seconds: float) -> dict[str, str | None]:
        process = self._process
        assert process is not None
        found: list[dict[str, str | None]] = []

        def exchange() -> None:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                data = json.dumps(question).encode()
                process.stdin.write(struct.pack("<I", len(data)) + data)
                process.stdin.flush()
                head = process.stdout.read(4)
                if len(head) == 4:
                    found.append(json.loads(process.stdout.read(struct.unpack("<I", head)[0])))
            except (OSError, ValueError):
                return  # it was killed, or died

        started = time.monotonic()
        thread = threading.Thread(target=exchange, name="herd-grammar-trial", daemon=True)
        thread.start()
        thread.join(seconds)
        if not found:
            self._kill()
            thread.join()
            slow = time.monotonic() - started >= seconds
            raise TooSlow(
                f"it takes more than {seconds:g} s to compile" if slow else "compiling it takes too much memory"
            )
        return found[0]

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:
                        continue  # what was still to be written to a dead process
