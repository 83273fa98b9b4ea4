"""SentencePiece BPE as Llama 1 and 2 have it, trained by the sentencepiece library in a process of its own. No torch.

The library leaves out lines that hold its own mark U+2585, and lines that are too long, and says so only in its log; it aborts
for very long words. So lines are cut here where they hold that mark or are long, and the lines that it took are counted.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from herd.errors import ConfigError, TokenizerError
from herd.tokenizer.pieces import PieceModel

__all__ = ["LINE", "MIN_SIZE", "lines_of", "train_pieces"]

LINE = 4096
"""Characters of the longest line given to the library. Lines are cut after a space where there is one."""

MIN_SIZE = 3 + 256
"""<unk>, <s>, </s> and the byte pieces: every character of the text needs one piece more."""

CHILD = Path(__file__).with_name("piecechild.py")
_MARK = "\u2585"
_TOOK = re.compile(rb"Loaded all (\d+) sentences")
_LETTERS = re.compile(rb"Alphabet size=(\d+)")
_STEPS = re.compile(rb"(?:merges|size)=(\d+) ")
_TOO_MANY = re.compile(r"too high \(\d+\).*?<= (\d+)")
_TOO_FEW = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")


def train_pieces(
    texts: Iterable[bytes], size: int, tick: Callable[[int, int], None] = lambda done, total: None
) -> PieceModel:
    """A SentencePiece vocabulary of `size` pieces in all, learned from UTF-8 `texts`. `tick` is told the pieces that are there.

    The same texts give the same vocabulary. Raises ConfigError when the text gives fewer pieces, or has more letters than
    pieces were asked for, and TokenizerError when the library fails otherwise.
    """
    if size <= MIN_SIZE:
        raise ConfigError(f"{size} pieces: {MIN_SIZE} are special or single bytes, so there must be more")
    with tempfile.TemporaryFile() as made:
        process = subprocess.Popen(
            [sys.executable, str(CHILD), str(size)], stdin=subprocess.PIPE, stdout=made, stderr=subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stderr is not None
        log = _Log(process.stderr, size, tick)
        sent = 0
        try:
            try:
                for line in lines_of(texts):
                    process.stdin.write(line)
                    sent += 1
                process.stdin.close()
            except BrokenPipeError:  # it has ended: its log says why
                pass
            log.join()
            status = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            log.join()
            process.stderr.close()
        if not sent:
            raise ConfigError("there is no text to learn pieces from")
        if status:
            raise _refused(log.refusal, log.last, size, status)
        if log.took != sent:
            raise TokenizerError(f"sentencepiece took {log.took:,} of {sent:,} lines: {log.last}")
        made.seek(0)
        return PieceModel.parse(made.read())


def lines_of(texts: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of UTF-8 `texts` as the library takes them, each with its line end; empty ones are passed over."""
    for text in texts:
        for line in re.split(f"[\n{_MARK}]", text.decode("utf-8")):
            while len(line) > LINE:
                at = line.rfind(" ", 1, LINE) if line.rfind(" ", 1, LINE) > 0 else LINE
                yield line[:at].encode() + b"\n"
                line = line[at:]
            if line:
                yield line.encode() + b"\n"


class _Log(threading.Thread):
    """Reads the library's log: how far it is, how many lines it took, why it refused."""

    def __init__(self, stream: Iterable[bytes], size: int, tick: Callable[[int, int], None]) -> None:
        super().__init__(daemon=True)
        self.took, self.refusal, self.last = 0, "", ""
        self._stream, self._size, self._tick, self._letters = stream, size, tick, 0
        self.start()

    def run(self) -> None:
        for line in self._stream:
            if found := _TOOK.search(line):
                self.took = int(found[1])
            elif found := _LETTERS.search(line):
                self._letters = int(found[1])
            elif found := _STEPS.search(line):
                self._tick(min(MIN_SIZE + self._letters + int(found[1]), self._size), self._size)
            elif line.startswith(b"refused: "):
                self.refusal = line[9:].decode("utf-8", "replace").strip()
            if line.strip() and not line.startswith(b"I0000"):
                self.last = line.decode("utf-8", "replace").strip()


def _refused(refusal: str, last: str, size: int, status: int) -> Exception:
    if found := _TOO_MANY.search(refusal):
        return ConfigError(
            f"the text gives {int(found[1]):,} pieces, not {size:,}: give it more text, or ask for {int(found[1])} at most"
        )
    if found := _TOO_FEW.search(refusal):
        return ConfigError(
            f"{size:,} pieces are too few for this text: special pieces, bytes and letters alone are {int(found[1]):,}"
        )
    how = f"was killed by signal {-status}" if status < 0 else "failed"
    return TokenizerError(f"training by the sentencepiece library {how}: {refusal or last or 'it says nothing'}")
