"""How well vocabularies fit texts: bytes in a token, tokens in a word, tokens that hold only a part of a character. No torch.

More bytes in a token mean fewer steps for the same text. What is counted is the text alone, without the token that begins it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from herd.data.adapt import Kind
from herd.data.files import find_files
from herd.data.report import BadRows, RowReport
from herd.errors import ConfigError, DataError, HerdError
from herd.tokenizer.pieces import UNKNOWN
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.tokenizer.tokenizer import Tokenizer
from herd.train.corpus import sample

__all__ = ["Fit", "broken_ids", "draw", "measure", "together"]


@dataclass(frozen=True, slots=True)
class Fit:
    """One tokenizer on one file: `size` bytes, `words` between white space, `tokens`, and `broken` ones among them.

    A broken token is unknown, or bytes that are no whole character.
    """

    file: str
    tokenizer: str
    size: int
    words: int
    tokens: int
    broken: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 that a token stands for."""
        return self.size / self.tokens if self.tokens else 0.0

    @property
    def tokens_per_word(self) -> float:
        """Tokens for a word, with the white space around it."""
        return self.tokens / self.words if self.words else 0.0

    @property
    def broken_share(self) -> float:
        """Share of tokens that are broken."""
        return self.broken / self.tokens if self.tokens else 0.0


def broken_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that are unknown or whose bytes are no whole characters."""
    found = set()
    for id in range(tokenizer.vocab_size):
        if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.model.types[id] == UNKNOWN:
            found.add(id)
            continue
        try:
            tokenizer.bytes_of(id).decode("utf-8")
        except UnicodeDecodeError:
            found.add(id)
        except HerdError:  # a hole in the numbering
            continue
    return frozenset(found)


def measure(
    paths: Sequence[str],
    tokenizers: Mapping[str, Tokenizer],
    budget: int,
    *,
    kind: Kind | None = None,
    bad: BadRows = "stop",
    report: RowReport,
    watch: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[list[Fit], bool]:
    """Every file with every tokenizer, in order, and whether all text was counted (of each file at most `budget` bytes are).

    Raises DataError for bad rows (or enters them in `report`) and for files without text.
    """
    files = [str(file) for path in paths for file in find_files(path, report.note)]
    if twice := [file for at, file in enumerate(files) if file in files[:at]]:
        raise DataError(f"{twice[0]}: is named twice")
    broken = {name: broken_ids(tokenizer) for name, tokenizer in tokenizers.items()}
    fits: list[Fit] = []
    whole = True
    for file in files:
        name = Path(file).name
        tick = lambda done, total, name=name: watch(f"reading {name}", done, total)  # noqa: E731
        taken = sample([file], budget, kind=kind, bad=bad, tick=tick)
        report.add(taken.report)
        whole &= taken.whole
        texts = [text.decode("utf-8") for text in taken.texts]
        words = sum(len(text.split()) for text in texts)
        for who, tokenizer in tokenizers.items():
            tokens = lost = done = 0
            for text, data in zip(texts, taken.texts, strict=True):
                ids = tokenizer.encode(text)
                tokens += len(ids)
                lost += sum(id in broken[who] for id in ids)
                done += len(data)
                watch(f"by {who}: {name}, bytes", done, taken.kept)
            fits.append(Fit(file, who, taken.kept, words, tokens, lost))
    return fits, whole


def together(fits: Sequence[Fit]) -> list[Fit]:
    """The sums over all files, one for each tokenizer."""
    sums = []
    for who in dict.fromkeys(fit.tokenizer for fit in fits):
        own = [fit for fit in fits if fit.tokenizer == who]
        counted = (sum(getattr(fit, name) for fit in own) for name in ("size", "words", "tokens", "broken"))
        sums.append(Fit("all", who, *counted))
    return sums


def draw(fits: Sequence[Fit], path: Path) -> None:
    """Write the bytes in a token as a picture to `path` (its ending says the format). Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'herd[plot]'") from error
    from herd.train.plot import COLOURS

    files = list(dict.fromkeys(fit.file for fit in fits))
    who = list(dict.fromkeys(fit.tokenizer for fit in fits))
    thick = 0.8 / len(who)
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(fits)), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(who):
        own = [fit for fit in fits if fit.tokenizer == name]
        places = [files.index(fit.file) + (number - (len(who) - 1) / 2) * thick for fit in own]
        bars = axes.barh(
            places,
            [fit.bytes_per_token for fit in own],
            height=thick,
            color=COLOURS[number % len(COLOURS)],
            label=name,
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.set_yticks(range(len(files)), [Path(file).name for file in files])
    axes.invert_yaxis()
    axes.set(xlabel="bytes of text in a token (more is better)")
    axes.margins(x=0.1)
    axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the picture cannot be written: {error}") from error
