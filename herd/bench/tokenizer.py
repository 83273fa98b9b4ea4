"""Encoding and opening speed of herd's tokenizers beside tiktoken, Meta's code, Hugging Face tokenizers and sentencepiece.

All encoders run in this process and take turns, each on a fresh copy of the text, so that other load and cached UTF-8 favour
none. Rates are medians by the clock, and by CPU time of all threads (herd encodes the slices of a long text on all cores). "own"
is the CPU time that herd spends outside tiktoken's core. Texts come from a folder of shared data when there is one, and from
Python's own library, which is everywhere. Packages that are not installed are left out.
"""

from __future__ import annotations

import gzip
import importlib
import importlib.metadata
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from herd.bench.machine import load_average, machine
from herd.bench.table import headline
from herd.errors import ConfigError
from herd.tokenizer.files import load_tokenizer
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.tokenizer.special import llama3_names, llama4_names
from herd.tokenizer.tiktoken import REGEX, TiktokenTokenizer

__all__ = ["tokenizer_bench", "tokenizer_table"]

PACKAGES = ("tiktoken", "sentencepiece", "tokenizers", "llama-models")
BYTES = 1_000_000
"""Of each text."""
Encode = Callable[[str], object]
RUNS = [
    "a",
    "^",
    "0",
    " ",
    "\n",
    "\t",
    "-",
    "=",
    "é",
    "漢",
    "字",
    "\U0001f600",
    "Z",
    ".",
    "'",
    "'s",
    "\r\n",
    "ab",
    "=-",
    "  x",
]


Say = Callable[[str, int, int], None]


def tokenizer_bench(shared: Path | None, repeats: int, say: Say = lambda what, done, total: None) -> dict[str, Any]:
    """{"machine", "families": [{"family", "opening", "rates", "short", "repeated"}]} of every vocabulary on this machine.

    `shared` holds texts and Llama 2's vocabulary (default: HERD_SHARED). Raises ConfigError when there is no vocabulary at all.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    place = shared or Path(os.environ.get("HERD_SHARED") or "shared")
    if shared is not None and not shared.is_dir():
        raise ConfigError(f"--shared: there is no folder {shared}")
    models = dict(find_models(place))
    if not models:
        raise ConfigError(
            "no vocabulary is here to be measured: pip install llama-models, which has those of Llama 3 and 4"
        )
    about, texts, families = machine(packages=PACKAGES), dict(read_texts(place, BYTES)), []
    for family, path in models.items():
        tokenizer = load_tokenizer(path)
        encoders = dict(find_encoders(tokenizer, path))
        rates = []
        for name, text in texts.items():
            say(f"{family}: {name}", len(rates), len(texts))
            rates.append(rates_of(name, text, tokenizer, encoders, repeats))
        families.append(
            {
                "family": family,
                "opening": opening(path, repeats),
                "rates": rates,
                "short": short_texts(texts, encoders, repeats),
                "repeated": repeated_texts(tokenizer),
            }
        )
    about["load_after"] = load_average()
    return {"machine": about, "repeats": repeats, "families": families}


def tokenizer_table(report: dict[str, Any]) -> str:
    """The report for people, in 80 columns."""
    lines = [headline(report["machine"]), "", f"Medians of {report['repeats']} runs by the clock, encoders in turn."]
    for family in report["families"]:
        own = family["opening"]
        lines += [
            "",
            f"{family['family']}: opens in {own['cpu']:.3f} s of CPU ({own['fresh']:.2f} s with Python's start)",
        ]
        for rate in family["rates"]:
            lines.append(f"  {rate['text']}: {rate['bytes'] / 1e6:.2f} MB, {rate['tokens']:,} tokens")
            for name, row in rate["encoders"].items():
                lines.append(
                    f"    {name:<16}{row['mb_per_s']:>7.2f} MB/s  {row['m_tokens_per_s']:>5.2f} M tok/s  {row['times']:>5.2f}x"
                    f"  spread {row['spread']:>4.0%}  CPU {row['cpu_mb_per_s']:>6.2f} MB/s"
                )
        short = ", ".join(f"{name} {value:.1f}" for name, value in family["short"].items())
        slowest = max(family["repeated"], key=family["repeated"].__getitem__)
        lines.append(f"  80 characters, microseconds: {short}")
        lines.append(
            f"  1 MB of one repeated text ({len(family['repeated'])} texts): slowest {slowest!r} with "
            f"{family['repeated'][slowest]:.2f} s of CPU"
        )
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_texts(shared: Path, size: int) -> Iterator[tuple[str, str]]:
    """(name, text of about `size` bytes) of each kind."""
    for name, file in (("English", "en_books"), ("code", "code_python"), ("multilingual", "multilingual")):
        path = shared / "data" / "pretrain" / f"{file}.jsonl.zst"
        if path.is_file() and _version("zstandard"):
            yield name, _take(_zstd_rows(path), size)
    held_out = shared / "data" / "eval" / "xquad.jsonl.gz"
    if held_out.is_file():
        with gzip.open(held_out, "rt", encoding="utf-8") as file:
            yield "12 languages, JSON", _take(file, size)
    library = Path(sysconfig.get_paths()["stdlib"])
    yield (
        "Python's library",
        _take((p.read_text(encoding="utf-8", errors="replace") for p in library.glob("*.py")), size),
    )


def _zstd_rows(path: Path) -> Iterator[str]:
    zstandard = importlib.import_module("zstandard")
    with path.open("rb") as file, zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(file) as stream:
        pending = b""
        while chunk := stream.read(1 << 20):
            *lines, pending = (pending + chunk).split(b"\n")
            # Every ninth document, so that a few megabytes hold many sources.
            yield from (json.loads(line)["text"] for line in lines[::9])


def _take(rows: Iterable[str], size: int) -> str:
    parts, total = [], 0
    for row in rows:
        parts.append(row)
        total += len(row.encode())
        if total >= size:
            break
    return "\n".join(parts)


def find_models(shared: Path) -> Iterator[tuple[str, Path]]:
    """(family, tokenizer.model) of what is on this machine."""
    for family in ("llama3", "llama4"):
        if _version("llama-models"):
            module = importlib.import_module(f"llama_models.{family}.tokenizer")
            yield family, Path(str(module.__file__)).parent / "tokenizer.model"
    llama2 = shared / "data" / "tokenizers" / "llama2.tokenizer.model"
    if llama2.is_file():
        yield "llama2", llama2


def find_encoders(tokenizer: object, path: Path) -> Iterator[tuple[str, Encode]]:
    """(name, encode) of herd and of everything beside it."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        yield "herd", tokenizer.encode
        processor = importlib.import_module("sentencepiece").SentencePieceProcessor(model_file=str(path))
        yield "sentencepiece", processor.encode
        return
    assert isinstance(tokenizer, TiktokenTokenizer)
    yield "herd", tokenizer.encode
    tiktoken = importlib.import_module("tiktoken")
    table = {token: rank for rank, token in enumerate(tokenizer.ranks)}
    # Each row has its own tables: shared ones would be used twice a round and be warmer in the cache than herd's.
    whole, core = (
        tiktoken.Encoding(
            name, pat_str=REGEX[tokenizer.family], mergeable_ranks=table, special_tokens=dict(tokenizer.special.ids)
        )
        for name in ("whole", "core")
    )
    yield "tiktoken encode", lambda text: whole.encode(text, disallowed_special=())
    yield "tiktoken core", core.encode_ordinary
    if _version("llama-models"):
        meta = importlib.import_module(f"llama_models.{tokenizer.family}.tokenizer").Tokenizer.get_instance()
        yield "Meta's code", lambda text: meta.encode(text, bos=False, eos=False)
    if _version("tokenizers") and _version("transformers"):
        names = llama3_names() if tokenizer.family == "llama3" else llama4_names()[:1135]
        converter = importlib.import_module("transformers.convert_slow_tokenizer").TikTokenConverter
        fast = converter(
            vocab_file=str(path), pattern=REGEX[tokenizer.family], extra_special_tokens=list(names)
        ).converted()
        fast.encode_special_tokens = True
        yield "HF tokenizers", lambda text: fast.encode(text, add_special_tokens=False).ids


def opening(path: Path, repeats: int) -> dict[str, float]:
    """Seconds to open the file: by the clock in a fresh process with Python's start and imports, and CPU time alone."""
    code = f"from herd.tokenizer.files import load_tokenizer; load_tokenizer({str(path)!r})"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    fresh = time.perf_counter() - started
    alone = statistics.median(timed(lambda: load_tokenizer(path)) for _ in range(repeats))
    return {"cpu": alone, "fresh": fresh}


def timed(call: Callable[[], object]) -> float:
    """CPU seconds of one call, all threads together."""
    started = time.process_time()
    call()
    return time.process_time() - started


def take_turns(encoders: dict[str, Encode], texts: list[str], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds, clock seconds) of every repeat of every encoder, in turn."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in encoders}
    for turn in range(repeats):
        # In a new order each time: who comes after a large or a related encoder finds other things in the cache.
        for name in random.Random(turn).sample(list(encoders), len(encoders)):
            encode = encoders[name]
            fresh = [(text + " ")[:-1] for text in texts]  # a new object has no cached UTF-8
            started = time.perf_counter()
            cpu = timed(lambda encode=encode, fresh=fresh: [encode(text) for text in fresh])
            seconds[name].append((cpu, time.perf_counter() - started))
    return seconds


def rates_of(name: str, text: str, tokenizer: Any, encoders: dict[str, Encode], repeats: int) -> dict[str, Any]:
    """One row per encoder: MB/s by the clock and by CPU time, tokens/s, spread, speed against tiktoken or sentencepiece."""
    size, count = len(text.encode()), len(tokenizer.encode(text))
    seconds = take_turns(encoders, [text], repeats)
    middle = {key: [statistics.median(column) for column in zip(*times, strict=True)] for key, times in seconds.items()}
    base = middle["tiktoken encode" if "tiktoken encode" in middle else "sentencepiece"]
    rows = {}
    for encoder, (cpu, clock) in middle.items():
        times = [pair[1] for pair in seconds[encoder]]
        rows[encoder] = {
            "mb_per_s": size / clock / 1e6,
            "m_tokens_per_s": count / clock / 1e6,
            "times": base[1] / clock,
            "spread": (max(times) - min(times)) / clock,
            "cpu_mb_per_s": size / cpu / 1e6,
            "samples": times,
        }
    return {"text": name, "bytes": size, "tokens": count, "encoders": rows}


def short_texts(texts: dict[str, str], encoders: dict[str, Encode], repeats: int) -> dict[str, float]:
    """Microseconds for one text of 80 characters."""
    text = next(iter(texts.values()))[:160_000]
    pieces = [text[i : i + 80] for i in range(0, len(text), 80)]
    seconds = take_turns(encoders, pieces, repeats)
    return {name: statistics.median(t[0] for t in times) / len(pieces) * 1e6 for name, times in seconds.items()}


def repeated_texts(tokenizer: Any) -> dict[str, float]:
    """CPU seconds for 1 MB of one repeated text, by text."""
    seconds = {}
    for unit in RUNS:
        text = unit * (1_000_000 // len(unit.encode()))
        seconds[unit] = timed(lambda text=text: tokenizer.encode(text))
    return seconds
