"""The other side of `herd.engine.grammar_trial`: compiles grammars that nobody knows yet, in a process that can be killed.

It is never imported: the trial starts this file with `python -I -S` and the folder that holds llguidance as its argument. It
speaks JSON behind a length of four bytes: {"text", "limits"} in, {"error"} out (null when the grammar compiles).
"""

from __future__ import annotations

import json
import os
import struct
import sys
from typing import Any

MEMORY = 128 * 2**20
"""Bytes of address space that compiling may take on top of the program itself."""


class Letters:
    """A vocabulary of single bytes and an end."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    eos_token_id = 255  # this byte is in no UTF-8 text
    special_token_ids = (255,)

    def __init__(self) -> None:
        self.tokens = [bytes([i]) for i in range(255)] + [b"<end>"]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def limit_memory() -> None:
    """No more than MEMORY beyond what is mapped now, where the system can promise that."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        return


def tried(llguidance: Any, vocabulary: Any, text: str, limits: dict[str, int]) -> str | None:
    """What is wrong with a grammar, None when it compiles and something can be written under it."""
    bounds = llguidance.LLParserLimits(**limits, verbose_errors=False)
    matcher_of = llguidance.LLMatcher
    failed, messages = matcher_of.validate_grammar_with_warnings(text, vocabulary, limits=bounds)
    if failed or messages:
        return str(messages[0]) if messages else "it cannot be read"
    matcher = matcher_of(vocabulary, text, log_level=0, limits=bounds)
    if not matcher.is_error():
        bits = matcher.compute_bitmask()
        if not matcher.is_error() and not matcher.is_accepting() and not any(bits):
            return "nothing can satisfy it"
    return str(matcher.get_error()) if matcher.is_error() else None


def main() -> None:
    sys.path.append(sys.argv[1])
    import llguidance

    vocabulary = llguidance.LLTokenizer(Letters(), n_vocab=256, eos_token=255)  # type: ignore[arg-type]  # looks like one
    limit_memory()
    source, sink = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    while len(head := source.read(4)) == 4:
        asked = json.loads(source.read(struct.unpack("<I", head)[0]))
        try:
            error = tried(llguidance, vocabulary, asked["text"], asked["limits"])
        except BaseException as failure:
            error = f"{type(failure).__name__}: {failure}"
        answer = json.dumps({"error": error}).encode()
        sink.write(struct.pack("<I", len(answer)) + answer)
        sink.flush()


if __name__ == "__main__":
    main()
