"""Encoding and opening speed of herd's tokenizers beside tiktoken, Meta's code, Hugging Face tokenizers and sentencepiece.

    python benchmarks/tokenizer.py [--shared ../shared] [--megabytes 2] [--repeats 5]

All encoders run in this process and take turns, each on a fresh copy of the text, so that other load and cached UTF-8 favour
none. Rates are medians by the clock, and by CPU time of all threads (herd encodes the slices of a long text on all cores); the
spread is (slowest - fastest) / median. "own" is the CPU time herd spends outside tiktoken's core. Texts come from the shared
folder when it is there, else Python's own library is the only text. Packages that are not installed are left out.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from herd.tokenizer.files import load_tokenizer  # noqa: E402
from herd.tokenizer.sentencepiece import SentencePieceTokenizer  # noqa: E402
from herd.tokenizer.special import llama3_names, llama4_names  # noqa: E402
from herd.tokenizer.tiktoken import REGEX, TiktokenTokenizer  # noqa: E402

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


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("HERD_SHARED") or ROOT.parent / "shared"))
    parser.add_argument("--megabytes", type=float, default=2.0, help="size of each text")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print_machine()
    texts = dict(read_texts(args.shared, int(args.megabytes * 1e6)))
    models = dict(find_models(args.shared))
    for family, path in models.items():
        print(f"\n{family}: opening {opening(path, args.repeats)}")
        tokenizer = load_tokenizer(path)
        encoders = dict(find_encoders(tokenizer, path))
        for name, text in texts.items():
            print_rates(name, text, tokenizer, encoders, args.repeats)
        print_short(texts, encoders, args.repeats)
        print_runs(tokenizer)


def print_machine() -> None:
    """Hardware, versions, commit and command line."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    packages = ("tiktoken", "sentencepiece", "tokenizers", "llama-models")
    print(f"hardware: {cpu or platform.processor()}, {os.cpu_count()} cores; {platform.system()} {platform.machine()}")
    print(f"python {platform.python_version()}; " + "; ".join(f"{p} {v}" for p in packages if (v := _version(p))))
    print(f"commit {commit.stdout.strip()}; {time.strftime('%Y-%m-%d')}; python {' '.join(sys.argv)}")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


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


def _take(rows: Iterator[str] | object, size: int) -> str:
    parts, total = [], 0
    for row in rows:  # type: ignore[attr-defined]
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


def opening(path: Path, repeats: int) -> str:
    """Seconds to open the file: once in a fresh process with imports, and alone."""
    code = f"from herd.tokenizer.files import load_tokenizer; load_tokenizer({str(path)!r})"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    fresh = time.perf_counter() - started
    alone = statistics.median(timed(lambda: load_tokenizer(path)) for _ in range(repeats))
    return f"{alone:.3f} s CPU ({fresh:.2f} s wall in a fresh process with Python's start and imports)"


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


def print_rates(name: str, text: str, tokenizer: object, encoders: dict[str, Encode], repeats: int) -> None:
    """One row per encoder: MB/s by the clock and by CPU time, tokens/s, spread, speed against tiktoken or sentencepiece."""
    size, count = len(text.encode()), len(tokenizer.encode(text))  # type: ignore[attr-defined]
    seconds = take_turns(encoders, [text], repeats)
    middle = {key: [statistics.median(column) for column in zip(*times, strict=True)] for key, times in seconds.items()}
    base = middle["tiktoken encode" if "tiktoken encode" in middle else "sentencepiece"]
    print(f"  {name}: {size / 1e6:.2f} MB, {count:,} tokens")
    for encoder, (cpu, clock) in middle.items():
        times = [pair[1] for pair in seconds[encoder]]
        rates = f"{size / clock / 1e6:6.2f} MB/s {count / clock / 1e6:5.2f} M tokens/s {base[1] / clock:5.2f}x"
        spread = (max(times) - min(times)) / clock
        print(
            f"    {encoder:<16} {rates}  spread {spread:4.0%}  (CPU time {size / cpu / 1e6:6.2f} MB/s {base[0] / cpu:5.2f}x)"
        )
    if "tiktoken core" in seconds:
        own = middle["herd"][0] - middle["tiktoken core"][0]
        print(f"    own: {own * 1e3:+.1f} ms, {own / middle['herd'][0]:+.1%} of herd's CPU time")


def print_short(texts: dict[str, str], encoders: dict[str, Encode], repeats: int) -> None:
    """Microseconds for one text of 80 characters."""
    text = next(iter(texts.values()))[:160_000]
    pieces = [text[i : i + 80] for i in range(0, len(text), 80)]
    seconds = take_turns(encoders, pieces, repeats)
    rows = (
        f"{name} {statistics.median(t[0] for t in times) / len(pieces) * 1e6:.1f}" for name, times in seconds.items()
    )
    print(f"  one text of 80 characters, microseconds: {', '.join(rows)}")


def print_runs(tokenizer: object) -> None:
    """CPU seconds for 1 MB of one repeated text, the slowest named."""
    seconds = {}
    for unit in RUNS:
        text = unit * (1_000_000 // len(unit.encode()))
        seconds[unit] = timed(lambda text=text: tokenizer.encode(text))  # type: ignore[attr-defined]
    slowest = max(seconds, key=seconds.__getitem__)
    print(f"  1 MB of one repeated text, {len(RUNS)} texts: slowest {slowest!r} with {seconds[slowest]:.3f} s CPU")
    print("    " + ", ".join(f"{unit!r} {value:.2f}" for unit, value in seconds.items()))


if __name__ == "__main__":
    main()
