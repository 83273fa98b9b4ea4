"""The fast session says what the naive one says, over native kernels and over torch."""

from __future__ import annotations

from functools import cache
from itertools import islice

import pytest
import torch

from herd.chat.params import SamplingParams
from herd.checkpoint.load import load
from herd.engine.native import NativeRunner
from herd.engine.paged_session import PagedSession, session_for
from herd.engine.runner import TorchRunner
from herd.engine.session import Session
from herd.errors import ConfigError, ContextFullError
from herd.kernels import native
from herd.model.llama import Llama
from herd.quant.apply import dequantize, quantize
from herd.tokenizer.tokenizer import Tokenizer
from tests.build import TINY, build, tiny, tokens
from tests.modes.pairs import pairs
from tests.quant.wide import WIDE

needs_native = pytest.mark.skipif(native.isa() is None, reason=f"no native kernels: {native.missing()}")

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_stop_ids=True)
BEGINNINGS = (
    "Once upon a time", "The dog", "A little girl named", "In the deep forest", "Why is the sky", "Tell me about", "My name is",
    "The king said", "One, two, three,", "It was raining and",
)  # fmt: skip
ENDINGS = ("", " who", " and then", ", but nobody knew", "\n\n")
CLOSE = 1e-4
"""Two best logits of nano closer than this may change places: its float32 logits, of order ten, differ by about 1e-5."""


@cache
def nano() -> tuple[Llama, Tokenizer]:
    return load("nano", dtype="float32")


@needs_native
@pytest.mark.parametrize(("beginning", "ending"), pairs(BEGINNINGS, ENDINGS))
def test_greedy_replies_of_nano(beginning: str, ending: str) -> None:
    """Token by token the same as the naive loop, as far as the naive loop's choice is clear."""
    model, tokenizer = nano()
    prompt = tokenizer.encode(beginning + ending, bos=True)
    fast, slow = PagedSession(model), Session(model)
    assert isinstance(fast.runner, NativeRunner)
    ours = list(fast.generate(prompt, GREEDY))
    theirs = list(slow.generate(prompt, GREEDY))
    if ours != theirs:
        at = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        with torch.no_grad():
            best = model(torch.tensor([prompt + theirs[:at]]))[0, -1].topk(2).values
        assert best[0] - best[1] < CLOSE, f"token {at} differs"


@pytest.mark.parametrize("name", TINY)
def test_the_same_over_torch(name: str) -> None:
    model = build(name)
    prompt = tokens(model.config, 40)[0].tolist()
    fast = PagedSession(model, runner=TorchRunner(model))
    assert list(fast.generate(prompt, GREEDY)) == list(Session(model).generate(prompt, GREEDY))


@needs_native
def test_quantized_replies_follow_the_twin() -> None:
    """8-bit activations move logits by a few percent: a clear choice of the dequantized twin stays."""
    model = build(WIDE)
    quantize(model, "int8")
    twin = dequantize(model)
    fast = PagedSession(model)
    assert isinstance(fast.runner, NativeRunner)
    assert fast.paged.dtype == torch.float16
    prompt = tokens(WIDE, 30)[0].tolist()
    made = list(fast.generate(prompt, GREEDY))
    with torch.no_grad():
        logits = twin(torch.tensor([prompt + made]))[0, len(prompt) - 1 : -1]
    lost = logits.amax(-1) - logits.gather(1, torch.tensor(made)[:, None])[:, 0]
    assert lost.max() < 0.15  # logits of order one, whose rms error is 0.016
    assert (lost == 0).float().mean() > 0.8


@needs_native
def test_a_conversation_reuses_what_is_there() -> None:
    model = build("llama-4-scout")
    prompt = tokens(model.config, 600)[0].tolist()
    fast, seen = PagedSession(model), []
    first = list(fast.generate(prompt, GREEDY, on_prefill=lambda done, total: seen.append((done, total))))
    assert seen == [(512, 600), (600, 600)]
    assert fast.paged.blocks * 16 >= 624, "the cache grew"
    longer = [*prompt, *first, 5, 6, 7]
    seen.clear()
    again = list(fast.generate(longer, GREEDY, on_prefill=lambda done, total: seen.append((done, total))))
    assert seen == [(len(longer), len(longer))]
    fresh = PagedSession(model)
    assert again == list(fresh.generate(longer, GREEDY))
    assert list(fast.generate(prompt[:300], GREEDY)) == list(PagedSession(model).generate(prompt[:300], GREEDY))


@needs_native
def test_an_unfinished_reply_leaves_the_session_usable() -> None:
    model = build("llama-2")
    session = PagedSession(model)
    started = session.generate([1, 2, 3], GREEDY)
    list(islice(started, 4))
    expected = list(PagedSession(model).generate([1, 2, 9], GREEDY))
    assert list(session.generate([1, 2, 9], GREEDY)) == expected
    with pytest.raises(RuntimeError, match="another reply"):
        list(started)


def test_limits_are_those_of_the_naive_session() -> None:
    session = session_for(build("llama-2"), max_len=20)
    with pytest.raises(ContextFullError):
        next(session.generate(list(range(1, 21)), GREEDY))
    assert len(list(session.generate(list(range(1, 19)), GREEDY))) == 2
    with pytest.raises(ConfigError, match="made for"):
        session_for(build("llama-2"), max_len=1 << 20)


def test_without_the_library_the_naive_session_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", lambda: "there is no compiler")
    assert type(session_for(build(tiny("llama-3")))) is Session
