"""herd.LLM: texts, chats, streams and scores over one engine, from threads and event loops; nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from herd.chat.messages import Message
from herd.chat.params import SamplingParams
from herd.engine.llm import LLM
from herd.engine.local import LocalChat
from herd.engine.request import TokenEvent
from herd.errors import ConfigError, ContextFullError, HerdError, PromptError, UnknownModelError
from tests.build import build
from tests.cli.tiny import CONTEXT, tiny_config, tokenizer, write_folder

MODEL = build(tiny_config())
HI = [{"role": "user", "content": "Hi"}]
GREEDY = SamplingParams(temperature=0, max_tokens=12)
LONG = SamplingParams(temperature=1, seed=1, ignore_stop_ids=True)


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM((MODEL, tokenizer()), debug=True) as made:
        yield made
        wait_until_idle(made)
        stats = made.stats()
        assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)


def wait_until_idle(made: LLM) -> None:
    """Until the engine has heard of every abort."""
    for _ in range(500):
        if not made._engine.busy:
            return
        threading.Event().wait(0.01)
    raise AssertionError("the engine is still busy")


def lookup(word: str) -> str:
    """Look a word up."""
    return word


def naive(text: str, params: SamplingParams = GREEDY) -> LocalChat:
    chat = LocalChat(MODEL, tokenizer())
    for _ in chat.complete(text, params):
        pass
    return chat


def test_texts_are_continued_in_their_order(llm: LLM) -> None:
    texts = [f"{i} and so on" * (1 + i % 3) for i in range(20)]
    done = llm.generate(texts, GREEDY)
    for text, one in zip(texts, done, strict=True):
        last = naive(text).last
        assert last is not None
        assert (one.prompt, one.text, one.outputs[0].tokens) == (text, last.text, last.tokens)
        assert one.outputs[0].finish_reason == last.finish_reason
        assert one.prompt_tokens[0] == tokenizer().special.bos


def test_ids_go_as_they_are(llm: LLM) -> None:
    (one,) = llm.generate([1, 2, 3], GREEDY)
    assert (one.prompt, one.prompt_tokens) == (None, [1, 2, 3])
    assert [c.prompt_tokens for c in llm.generate([[1, 2], [3]], GREEDY)] == [[1, 2], [3]]
    assert llm.generate([], GREEDY) == []


def test_every_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    short, long = llm.generate(["a", "a"], [SamplingParams(temperature=0, max_tokens=n) for n in (3, 9)])
    assert long.outputs[0].tokens[:3] == short.outputs[0].tokens
    with pytest.raises(ConfigError, match="2 sampling parameters were given for 3 prompts"):
        llm.generate(["a"] * 3, [GREEDY] * 2)


def test_log_probabilities(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=0)
    (one,) = llm.generate("abc", params)
    output = one.outputs[0]
    assert output.logprobs is not None
    assert [p.token for p in output.logprobs] == output.tokens
    assert all(next(iter(p.top)) == p.token for p in output.logprobs)
    assert output.cumulative_logprob == pytest.approx(sum(p.logprob for p in output.logprobs))
    assert one.prompt_logprobs is not None
    assert [None if p is None else p.token for p in one.prompt_logprobs] == [None, *b"abc"]
    assert llm.generate("abc", GREEDY)[0].outputs[0].logprobs is None


def test_the_best_of_several(llm: LLM) -> None:
    params = SamplingParams(temperature=1, seed=3, max_tokens=6, n=2, best_of=5)
    (best,) = llm.generate("abc", params)
    (every,) = llm.generate("abc", SamplingParams(temperature=1, seed=3, max_tokens=6, n=5, logprobs=0))
    means = {one.index: (one.cumulative_logprob or 0) / len(one.tokens) for one in every.outputs}
    assert [one.index for one in best.outputs] == sorted(means, key=lambda i: -means[i])[:2]


def test_stop_strings_end_a_text(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=60)
    (whole,) = llm.generate("abc", params)
    stop = whole.text[20:23]
    (cut,) = llm.generate("abc", SamplingParams(temperature=0, max_tokens=60, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.outputs[0].finish_reason == "stop"
    assert len(cut.outputs[0].tokens) < 60
    late = SamplingParams(temperature=0, max_tokens=60, min_tokens=59, stop=(stop,))
    assert len(llm.generate("abc", late)[0].outputs[0].tokens) >= 59


def test_a_chat_is_what_the_naive_loop_says(llm: LLM) -> None:
    chat = LocalChat(MODEL, tokenizer())
    deltas = list(chat.stream([Message("user", "Hi")], params=GREEDY))
    reply = llm.chat(HI, GREEDY)
    assert chat.last is not None
    assert (reply.message, reply.tokens, reply.finish_reason) == (
        chat.last.message,
        chat.last.tokens,
        chat.last.finish_reason,
    )
    assert reply.usage.prompt_tokens == chat.last.usage.prompt_tokens
    stream = llm.stream(HI, GREEDY)
    assert list(stream) == deltas
    assert stream.reply.message == reply.message
    several = llm.chat([HI, [*HI, {"role": "assistant", "content": "x"}, HI[0]]], GREEDY)
    assert several[0].message == reply.message
    assert several[1].usage.prompt_tokens > reply.usage.prompt_tokens


def test_the_next_turn_finds_the_last_one_in_the_cache(llm: LLM) -> None:
    first = [{"role": "user", "content": "Tell me a long story about a dog"}]
    reply = llm.chat(first, GREEDY)
    again = llm.chat([*first, {"role": "assistant", "content": reply.text}, HI[0]], GREEDY)
    assert again.usage.cached_tokens >= len(llm.format.render([Message("user", first[0]["content"])]).tokens) // 16 * 16
    assert llm.stats().prefix_hits > 0


def test_a_stream_that_is_left_ends_the_request(llm: LLM) -> None:
    with llm.stream("abc", LONG) as stream:
        next(stream)
    assert stream.reply.finish_reason == "abort"
    assert 0 < len(stream.reply.tokens) < CONTEXT
    for _ in llm.stream("abc", LONG):
        break
    gc.collect()  # nobody holds the stream any more
    wait_until_idle(llm)


def test_asynchronously(llm: LLM) -> None:
    async def main() -> None:
        texts, reply = await asyncio.gather(llm.agenerate(["a", "b"], GREEDY), llm.achat(HI, GREEDY))
        assert [one.text for one in texts] == [naive("a").last.text, naive("b").last.text]  # type: ignore[union-attr]
        assert reply.message == llm.chat(HI, GREEDY).message
        stream = llm.astream(HI, GREEDY)
        deltas = [delta async for delta in stream]
        assert deltas == list(llm.stream(HI, GREEDY))
        assert (await stream.reply()).message == reply.message

    asyncio.run(main())


def test_cancelling_ends_the_requests(llm: LLM) -> None:
    async def main() -> None:
        async def read() -> None:
            async for _ in llm.astream("abc", LONG):
                begun.set()

        begun = asyncio.Event()
        tasks = [asyncio.create_task(work) for work in (read(), llm.agenerate(["a", "b"], LONG), llm.achat(HI, LONG))]
        await begun.wait()
        for task in tasks:
            task.cancel()
        for task in tasks:
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    wait_until_idle(llm)
    assert llm.stats().generated_tokens < 4 * 200


def test_from_many_threads(llm: LLM) -> None:
    expected = {text: naive(text).last.tokens for text in "abcdef"}  # type: ignore[union-attr]
    with ThreadPoolExecutor(8) as pool:
        for text, (one,) in zip("abcdef" * 8, pool.map(lambda t: llm.generate(t, GREEDY), "abcdef" * 8), strict=True):
            assert one.outputs[0].tokens == expected[text]


def test_scores_are_sums_of_log_probabilities(llm: LLM) -> None:
    pairs = [("a long context that is shared by all", tail) for tail in ("xy", " xyz", "b")] + [("", "abc")]
    for (context, tail), score in zip(pairs, llm.score(pairs), strict=True):
        ids = [tokenizer().special.bos, *(context + tail).encode()]
        with torch.inference_mode():
            logp = MODEL(torch.tensor([ids]))[0].log_softmax(-1)
        at = range(len(ids) - len(tail), len(ids))
        assert score.logprob == pytest.approx(sum(float(logp[i - 1, ids[i]]) for i in at), abs=1e-3)
        assert score.num_tokens == len(tail)
        assert score.is_greedy == all(int(logp[i - 1].argmax()) == ids[i] for i in at)
    greedy = llm.generate("abc", SamplingParams(temperature=0, max_tokens=5, ignore_stop_ids=True))[0]
    if greedy.text.isascii():
        assert llm.loglikelihood([("abc", greedy.text)])[0].is_greedy
    assert llm.stats().cached_tokens > 0
    with pytest.raises(PromptError, match="pair 1: the continuation is empty"):
        llm.score([("a", "b"), ("a", "")])


def test_what_cannot_run_is_refused_before_any_work(llm: LLM) -> None:
    with pytest.raises(ContextFullError, match=r"prompt 1'.* has 301 tokens and the context holds 256") as full:
        llm.generate(["a", "a" * 300], GREEDY)
    assert (full.value.needed, full.value.available) == (302, 256)
    for work, why in (
        (lambda: llm.chat(HI, SamplingParams(n=2)), "one reply"),
        (lambda: llm.stream("a", GREEDY, tools=[lookup]), "without tools"),
        (lambda: llm.generate(["a", 5], GREEDY), "prompt 1 is not a text"),  # type: ignore[list-item]
        (lambda: llm.generate([["a"]], GREEDY), "prompt 0 is not a text or a list of token ids"),  # type: ignore[list-item]
        (lambda: llm.chat([{"role": "nobody"}]), "role is 'nobody'"),
    ):
        with pytest.raises((HerdError, TypeError), match=why):
            work()
    assert llm.stats().requests == 0


def test_a_request_that_fails_is_an_error_or_kept(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = llm._engine.runner

    class Broken:
        def logits(self, batch, cache):  # type: ignore[no-untyped-def]
            if (batch.tokens == ord("!")).any():
                raise RuntimeError("boom")
            return runner.logits(batch, cache)

    monkeypatch.setattr(llm._engine, "runner", Broken())
    clean = SamplingParams(temperature=0, max_tokens=6, logit_bias={ord("!"): -100})
    with pytest.raises(HerdError, match=r"boom \(1 of 3 requests failed\)"):
        llm.generate(["a", "b!", "c"], clean)
    done = llm.generate(["a", "b!", "c"], clean, errors="keep")
    assert [one.outputs[0].finish_reason for one in done] == ["length", "error", "length"]
    assert "boom" in (done[1].error or "")
    with pytest.raises(HerdError, match="boom"):
        llm.chat([{"role": "user", "content": "!"}], clean)
    with pytest.raises(HerdError, match="boom"):
        list(llm.stream("!", clean))
    assert llm.generate("a", clean)[0].text == done[0].text


def test_a_broken_engine_tells_everyone_and_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM((MODEL, tokenizer())) as llm:

        def step() -> list[TokenEvent]:
            raise AssertionError("a bug")

        monkeypatch.setattr(llm._engine, "step", step)
        with pytest.raises(AssertionError, match="a bug"):
            llm.generate("a", GREEDY)
        with pytest.raises(HerdError, match="stopped after an error: a bug"):
            llm.generate("a", GREEDY)


def test_closing_ends_the_thread_and_what_runs() -> None:
    llm = LLM((MODEL, tokenizer()))
    stream = llm.stream("abc", LONG)
    next(stream)
    llm.close()
    llm.close()
    assert stream.reply.finish_reason == "abort"
    assert not any(thread.name == "herd-engine" for thread in threading.enumerate())
    with pytest.raises(HerdError, match="has been closed"):
        llm.generate("a")


def test_one_that_is_dropped_closes_itself() -> None:
    llm = LLM((MODEL, tokenizer()))
    llm.generate("a", GREEDY)
    del llm
    gc.collect()
    assert not any(thread.name == "herd-engine" for thread in threading.enumerate())


def test_from_a_folder_with_its_own_defaults(tmp_path: Path) -> None:
    with LLM(write_folder(tmp_path / "tiny"), max_len=64, kv="bf16", memory="1 MB", max_seqs=2) as llm:
        assert llm.params().temperature == 0.7
        assert llm.max_len == 64
        assert "in bfloat16" in llm.budget.sentence()
        assert llm.model.norm.weight.dtype == torch.float32
        assert len(llm.chat(HI, llm.params(max_tokens=3)).tokens) <= 3


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_len": 300}, "made for 256"),
        ({"memory": "1 kB"}, "holds 0 tokens"),
        ({"kv": "int3"}, "'int3'"),
        ({"format": "nonsense"}, "nonsense"),
        ({"weights": "int8"}, "leave them out"),
        ({"max_seqs": 0}, "max_seqs"),
    ],
)
def test_limits_that_do_not_fit_are_refused(options: dict[str, object], why: str) -> None:
    with pytest.raises(HerdError, match=why):
        LLM((MODEL, tokenizer()), **options)  # type: ignore[arg-type]


def test_an_unknown_model() -> None:
    with pytest.raises(UnknownModelError):
        LLM("no such model")
