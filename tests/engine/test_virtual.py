"""Virtual tokens in the engine: what PEFT says and what trained them says, beside LoRA and the base, and wrong ones refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from herd.adapters.prefix import Prefix, PrefixTuned, Prompt, PromptTuned, Virtual
from herd.chat.messages import Message
from herd.chat.params import SamplingParams
from herd.checkpoint.adapter import read_adapter
from herd.checkpoint.peft_virtual import write_virtual
from herd.engine import embed as embedding
from herd.engine.adapters import AdapterSet
from herd.engine.draft_model import ModelDrafter
from herd.engine.engine import Engine
from herd.engine.llm import LLM
from herd.engine.local import LocalChat
from herd.engine.native import NativeRunner
from herd.engine.ngram import NgramDrafter
from herd.engine.pace import Pace
from herd.engine.paged import PagedCache
from herd.engine.paged_session import PagedSession
from herd.engine.request import Request, TokenEvent
from herd.engine.speculate import Speculation
from herd.engine.virtual import virtual_tokens
from herd.errors import CheckpointError, ConfigError, ContextFullError
from herd.kernels.paged import dequantize_rows, quantize_rows
from herd.model.attend import masked_attention
from herd.model.llama import Llama
from herd.quant.apply import quantize
from tests.adapters.test_prefix import saved_by_peft, theirs_on
from tests.build import build, tokens
from tests.engine import test_adapters, test_ahead
from tests.engine.tape import Tape
from tests.engine.test_adapters import engine, request
from tests.modes.test_paged import INT8_BOUND

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LOGITS = 2e-5
"""float32 logits of order one: PEFT's, the training side's and native kernels' sums run in other orders."""
KINDS = ["prefix", "prompt"]
REPLY = 8


def random_adapter(model: Llama, kind: str, count: int, seed: int = 0) -> Virtual:
    config, generator = model.config, torch.Generator().manual_seed(seed)
    if kind == "prompt":
        return Prompt(torch.randn(count, config.dim, generator=generator), "some base")
    shape = config.n_layers, count, config.n_kv_heads, config.head_dim
    return Prefix(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), "some base")


def trained(model: Llama, adapter: Virtual) -> Llama:
    """The model that training and scoring have; the base is a copy, for it is frozen."""
    base = copy.deepcopy(model)
    return PrefixTuned(base, adapter) if isinstance(adapter, Prefix) else PromptTuned(base, adapter)


def greedy(
    forward: Callable[[Tensor], Tensor], prompt: tuple[int, ...], count: int = REPLY
) -> tuple[list[int], list[float]]:
    """The likeliest tokens and their log-probabilities, every one from a whole forward; its best two must not be a tie."""
    ids, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            row = forward(torch.tensor([ids]))[0, -1].log_softmax(-1)
            best = row.topk(2).values
            assert best[0] - best[1] > 10 * LOGITS, "take another seed"
            ids.append(int(row.argmax()))
            logprobs.append(float(best[0]))
    return ids[len(prompt) :], logprobs


def told(made: Engine, *asked: Request) -> dict[str, list[TokenEvent]]:
    for one in asked:
        made.add(one)
    out: dict[str, list[TokenEvent]] = {one.id: [] for one in asked}
    while made.busy:
        for event in made.step():
            assert event.error is None
            out[event.request_id].append(event)
    return out


def said(events: list[TokenEvent]) -> list[int]:
    return [event.token for event in events if event.token is not None]


@pytest.mark.parametrize("kind", ["prefix", "projected", "prompt"])
@pytest.mark.parametrize("name", ["llama-2", "llama-3", "llama-3.2"])
def test_the_tokens_and_numbers_of_peft(name: str, kind: str, tmp_path: Path) -> None:
    """A folder that PEFT wrote, served: its greedy tokens, the log-probabilities of prompt and reply; and herd's own scoring."""
    model = build(name)
    theirs = saved_by_peft(tmp_path, model, kind)
    prompt = tuple(tokens(model.config, 21)[0].tolist())
    expected, logprobs = greedy(lambda ids: theirs_on(theirs, ids), prompt)
    with torch.no_grad():
        whole = theirs_on(theirs, torch.tensor([prompt]))[0].log_softmax(-1)
    made = engine(model)
    loaded = made.load_adapter("p", tmp_path)
    assert (loaded.kind, loaded.virtual, loaded.rank) == ("prompt" if kind == "prompt" else "prefix", 5, 0)
    asked = request("x", "p", prompt, max_tokens=REPLY, logprobs=1, prompt_logprobs=1)
    events = told(made, asked)["x"]
    assert said(events) == expected
    assert max(abs((e.logprob or 0) - p) for e, p in zip(events, logprobs, strict=True)) <= LOGITS
    scored = events[0].prompt_logprobs
    assert scored is not None
    assert [token for token, *_ in scored] == list(prompt[1:])
    assert max(abs(p - float(whole[i, prompt[i + 1]])) for i, (_, p, _) in enumerate(scored)) <= LOGITS
    adapter = read_adapter(tmp_path, model.config)
    assert isinstance(adapter, Prefix | Prompt)
    assert greedy(trained(model, adapter), prompt)[0] == expected
    assert greedy(model, prompt)[0] != expected


def both(model: Llama) -> dict[str, Virtual]:
    """A prefix that fills no block, and a prompt that fills two of four."""
    return {"prefix": random_adapter(model, "prefix", 5), "prompt": random_adapter(model, "prompt", 8, seed=1)}


@pytest.mark.parametrize("name", ["llama-2-70b", "llama-3"])
def test_beside_lora_and_the_base_in_one_step(name: str) -> None:
    """Each gets what its own model says, and the base the bits that it gets alone."""
    model = build(name)
    change = test_adapters.adapter(model, 1)
    virtual = both(model)
    made = engine(model)
    made.load_adapter("lora", change)
    for label, adapter in virtual.items():
        made.load_adapter(label, adapter)
    prompt = tuple(tokens(model.config, 18)[0].tolist())
    models = {None: model, "lora": test_adapters.merged(model, change)}
    models |= {label: trained(model, adapter) for label, adapter in virtual.items()}
    names = [None, "prefix", "lora", "prompt", "prefix", None]
    asked = [request(f"r{i}", label, prompt[i // 4 :], max_tokens=REPLY, logprobs=0) for i, label in enumerate(names)]
    found = told(made, *asked)
    for one in asked:
        assert said(found[one.id]) == greedy(models[one.adapter], one.prompt)[0], one.adapter
    alone = told(engine(model), asked[0])["r0"]
    assert [(e.token, e.logprob) for e in alone] == [(e.token, e.logprob) for e in found["r0"]]
    counts = made.pool.counts
    assert counts["pinned"] == 2 + 2
    assert counts["free"] + counts["cached"] + counts["pinned"] == counts["total"]
    assert made.stats().blocks_pinned == 4
    assert made.stats().prompt_tokens == sum(len(one.prompt) for one in asked), "virtual tokens are no tokens"


def test_prefixes_are_found_behind_their_own_adapter_only() -> None:
    model = build("llama-3")
    made = engine(model)
    for label, adapter in both(model).items():
        made.load_adapter(label, adapter)

    def cached(label: str | None) -> int:
        return told(made, request("x", label))["x"][-1].cached_tokens

    names = ("prefix", "prompt", None)
    assert [cached(one) for one in names] == [0, 0, 0]
    # Of 20 tokens, the last of which must run, in blocks of 4: behind 5 virtual ones 3, 7, ... tokens end a block.
    assert [cached(one) for one in names] == [19, 16, 16]
    made.unload_adapter("prefix")
    assert made.pool.counts["pinned"] == 2
    made.load_adapter("prefix", random_adapter(model, "prefix", 5, seed=9))
    assert [cached(one) for one in names] == [0, 16, 16]
    for one in names[:2]:
        made.unload_adapter(one)
    told(made, request("x", None))
    assert made.pool.counts["pinned"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_guesses_are_checked_behind_them(kind: str) -> None:
    """A draft model knows nothing of virtual tokens: the replies are the same, whatever it guesses."""
    model = build("llama-3")
    asked = [request("a", "p"), request("b", None), request("c", "p", (1, 2, 1, 2, 1))]
    out = []
    for drafter in (None, NgramDrafter(4, shortest=1), ModelDrafter(model)):
        made = engine(model)
        if drafter is not None:
            made.speculation = Speculation(drafter, model.config, pace=Pace(4, always=True))
        made.load_adapter("p", random_adapter(model, kind, 6))
        out.append({id: said(events) for id, events in told(made, *asked).items()})
    assert out[0] == out[1] == out[2]
    assert out[0]["a"] != out[0]["b"]


def test_recorded_steps_of_a_gpu() -> None:
    """On a tape: rows behind virtual tokens are recorded and begun ahead like others, alone and preempted."""
    model = test_ahead.build("llama-3.2")
    adapter = random_adapter(model, "prefix", 11)
    wanted = [replace(one, adapter="p" if i % 2 else None) for i, one in enumerate(test_ahead.requests(384))]
    expected, tape = {}, Tape()
    for blocks, own in ((40, None), (40, tape), (16, tape)):
        made = test_ahead.engine(test_ahead.build("llama-3.2"), own, blocks=blocks)
        made.load_adapter("p", adapter)
        replies = test_ahead.replies(made, wanted, random.Random(1))
        found = {key: [(e.token, e.finish) for e in events] for key, events in replies.items()}
        expected = expected or found
        assert found == expected
    assert tape.replays > tape.made


class Rounded:
    """Attention over virtual and other keys and values as an int8 cache keeps them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.first = keys, values

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
        k, v = (torch.cat([own[None], x], 1) for own, x in zip(self.first, (k, v), strict=True))
        k, v = (dequantize_rows(*quantize_rows(x), x.dtype) for x in (k, v))
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        return masked_attention(q, k, v, mask[None, None])


@pytest.mark.parametrize("kind", KINDS)
def test_an_int8_cache_rounds_them_like_any_other(kind: str) -> None:
    model = build("llama-3")
    adapter = random_adapter(model, kind, 6)
    virtual = virtual_tokens(model, adapter)
    prompt = tokens(model.config, 17)
    see = [Rounded(k, v) for k, v in zip(virtual.keys, virtual.values, strict=True)]
    with torch.no_grad():
        hidden = model.hidden(model.embed(prompt), torch.arange(6, 23), see)
        expected, exact = model.output(hidden)[0, -1], trained(model, adapter)(prompt)[0, -1]
    made = engine(model, kv="int8")
    made.load_adapter("p", adapter)
    asked = replace(request("x", "p", tuple(prompt[0].tolist()), max_tokens=1), logits=True)
    found = torch.from_numpy(told(made, asked)["x"][0].logits)
    assert (found - expected).abs().max() <= INT8_BOUND
    assert (exact - expected).abs().max() > INT8_BOUND, "it would be seen if they were not rounded"


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_on_a_quantized_base(weights: str) -> None:
    """Rows stay on the layers that the base has; a prompt is read by these very layers."""
    model = build(replace(build("llama-3").config, hidden_dim=192))
    assert quantize(model, weights) == []
    prompt = tuple(tokens(model.config, 18)[0].tolist())
    for label, adapter in both(model).items():
        made = engine(model)
        made.load_adapter(label, adapter)
        asked = replace(request("x", label, prompt, max_tokens=1), logits=True)
        found = torch.from_numpy(told(made, asked)["x"][0].logits)
        tuned = PrefixTuned(model, adapter) if isinstance(adapter, Prefix) else PromptTuned(model, adapter)
        with torch.no_grad():
            expected, plain = tuned(torch.tensor([prompt]))[0, -1], model(torch.tensor([prompt]))[0, -1]
        assert (found - expected).abs().max() <= test_adapters.EIGHT_BITS * float(expected.abs().max())
        assert (found - plain).abs().max() > 5 * test_adapters.EIGHT_BITS * float(expected.abs().max())


def test_weights_that_change_change_what_a_prompt_becomes() -> None:
    model = build("llama-3")
    made = engine(model)
    for label, adapter in both(model).items():
        made.load_adapter(label, adapter)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    made.runner = NativeRunner(model) if isinstance(made.runner, NativeRunner) else made.runner
    made.weights_changed()
    prompt = tuple(tokens(model.config, 9)[0].tolist())
    for label, adapter in both(model).items():
        found = said(told(made, request(label, label, prompt, max_tokens=4))[label])
        assert found == greedy(trained(model, adapter), prompt, 4)[0]


def wrong(kind: str, model: Llama) -> Any:
    config = model.config
    good = random_adapter(model, "prefix", 5)
    assert isinstance(good, Prefix)
    match kind:
        case "other heads":
            return random_adapter(build("llama-2"), "prefix", 5)
        case "other width":
            return Prompt(torch.zeros(3, config.dim + 1))
        case "other layers":
            return Prefix(good.keys[:1], good.values[:1])
        case "keys and values":
            return Prefix(good.keys, good.values[:, :4])
        case "not finite":
            return replace(good, values=good.values / 0)
        case "integers":
            return Prompt(torch.zeros(3, config.dim, dtype=torch.int8))
        case "none":
            return Prompt(torch.zeros(0, config.dim))
        case "flat":
            return Prefix(good.keys.flatten(), good.values.flatten())
        case "larger than the context":
            return random_adapter(model, "prefix", 59)
        case "infinite":
            return Prompt(torch.full((3, config.dim), float("inf")))
    raise AssertionError


REASONS = {
    "other heads": r"a prefix of shape \(2, 5, 4, 16\): this base has \(2, 5, 2, 16\)",
    "other width": r"a prompt of shape \(3, 65\): this base has dim 64",
    "other layers": r"a prefix of shape \(1, 5, 2, 16\)",
    "keys and values": r"a prefix of shape \(2, 4, 2, 16\)",
    "not finite": "not finite",
    "integers": "int8: expected floats",
    "none": "a prompt of shape",
    "flat": "a prefix of shape",
    "larger than the context": "59 virtual tokens leave no room for a prompt and a reply in a context of 60 tokens",
    "infinite": "not finite",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_wrong_one_is_refused_and_nothing_has_changed(kind: str) -> None:
    model = build("llama-3")
    made = engine(model)
    with pytest.raises((CheckpointError, ConfigError), match=REASONS[kind]):
        made.load_adapter("p", wrong(kind, model))
    assert made.adapters.names == ()
    assert made.pool.counts["free"] == made.pool.counts["total"]
    with pytest.raises(ConfigError, match="no adapter 'p'"):
        made.add(request("x", "p"))


def test_refusals_by_name(tmp_path: Path) -> None:
    model = build("llama-3")
    made = engine(model, kv="float16")
    large = random_adapter(model, "prefix", 5)
    assert isinstance(large, Prefix)
    with pytest.raises(
        CheckpointError, match=r"up to .*e\+06, too large for keys and values in float16: choose kv='float32'"
    ):
        made.load_adapter("p", replace(large, keys=large.keys * 1e6))
    assert made.pool.counts["pinned"] == 0
    made.load_adapter("p", large)
    with pytest.raises(ConfigError, match="'p' is loaded already"):
        made.load_adapter("p", large)
    with pytest.raises(ConfigError, match="'p' is loaded already"):
        made.load_adapter("p", test_adapters.adapter(model, 1))
    with pytest.raises(ConfigError, match="needs a name"):
        made.load_adapter("", large)
    made.add(request("x", "p"))
    with pytest.raises(ConfigError, match="has 1 unfinished requests"):
        made.unload_adapter("p")
    made.step()
    made.abort("x")
    made.step()
    with pytest.raises(ContextFullError, match="beside the 5 virtual tokens of adapter 'p'"):
        made.add(request("y", "p", tuple(range(55))))
    made.unload_adapter("p")
    assert made.pool.counts["pinned"] == 0
    write_virtual(large, tmp_path, model.config, lambda _: None)
    with pytest.raises(ConfigError, match=r"Engine.load_adapter"):
        AdapterSet(model).load("p", tmp_path)
    with pytest.raises(ConfigError, match="Llama 4"):
        engine(build("llama-4-scout")).load_adapter("p", Prompt(torch.zeros(3, 80)))
    with pytest.raises(ConfigError, match="leave no room"):
        PagedSession(model, max_len=6, virtual=virtual_tokens(model, large))
    cache = PagedCache(model.config, blocks=2, block_size=4)
    before = [t.clone() for t in cache.tensors]
    virtual_tokens(model, large).put(cache, [1, 0])
    assert not any(map(torch.equal, before, cache.tensors))


def nano_adapter(llm: LLM, kind: str, count: int = 20) -> Virtual:
    """A task that a few tokens of another text make, so that replies stay text."""
    ids = llm.tokenizer.encode("The cat said: no, no, no! She was angry and", bos=True)[:count]
    ids += [ids[-1]] * (count - len(ids))
    with torch.inference_mode():
        embeddings = llm.model.embed(torch.tensor(ids)).float()
    if kind == "prompt":
        return Prompt(embeddings)
    found = virtual_tokens(llm.model, Prompt(embeddings))
    return Prefix(found.keys, found.values)


GREEDY = SamplingParams(temperature=0, max_tokens=16)
TEXT = "A dog. A dog. A"


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_of_an_llm(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM("nano", max_len=200, max_seqs=4, kv="float32", debug=True) as llm:
        adapter = nano_adapter(llm, kind)
        write_virtual(adapter, tmp_path, llm.model.config, lambda _: None)
        loaded = llm.load_adapter("p", tmp_path)
        assert llm.adapters == (loaded,)
        assert (llm.max_len, llm.room("p"), loaded.virtual) == (200, 180, 20)
        base, tuned = (llm.generate(TEXT, GREEDY, adapter=name)[0].text for name in (None, "p"))
        assert base != tuned
        assert "".join(d.text or "" for d in llm.stream(TEXT, GREEDY, adapter="p")) == tuned
        talk = [{"role": "user", "content": "What did she say?"}]
        reply = llm.chat(talk, GREEDY, adapter="p")
        assert reply.message.text != llm.chat(talk, GREEDY).message.text
        assert reply.usage.prompt_tokens == len(llm.format.render([Message("user", "What did she say?")]).tokens)
        chat = LocalChat(llm.model, llm.tokenizer, max_len=200, virtual=virtual_tokens(llm.model, adapter))
        assert chat.max_len == 180
        assert (
            "".join(d.text or "" for d in chat.stream([Message("user", "What did she say?")], (), GREEDY))
            == reply.message.text
        )

        best = llm.generate(TEXT, replace(GREEDY, beams=2, max_tokens=5), adapter="p")[0].outputs[0]
        (score,) = llm.score([(TEXT, best.text)], adapter="p")
        assert score.logprob != llm.score([(TEXT, best.text)])[0].logprob
        model, ids = trained(llm.model, adapter), llm.tokenizer.encode(TEXT, bos=True)
        with torch.no_grad():
            rows = model(torch.tensor([[*ids, *best.tokens]]))[0].log_softmax(-1)
        own = sum(float(rows[len(ids) - 1 + i, token]) for i, token in enumerate(best.tokens))
        # nano's logits are of order ten, and five of them are added.
        assert best.cumulative_logprob == pytest.approx(own, abs=5e-4)

        long = llm.tokenizer.encode("word " * 60, bos=True)
        with torch.no_grad():
            states = [trained(llm.model, adapter).hidden(model.embed(torch.tensor([one])))[0] for one in (ids, long)]
        for rows_at_once in (512, 16):
            monkeypatch.setattr(embedding, "ROWS", rows_at_once)
            for pooling in ("mean", "last"):
                found = llm.embed([ids, long], adapter="p", pooling=pooling, normalize=False)
                expected = torch.stack([one.mean(0) if pooling == "mean" else one[-1] for one in states])
                assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
        with pytest.raises(ContextFullError, match="the context holds 180"):
            llm.embed([list(range(5, 186))], adapter="p")
        with pytest.raises(
            ContextFullError, match=r"the context holds 180 beside the 20 virtual tokens of adapter 'p'"
        ):
            llm.generate([list(range(5, 185))], GREEDY, adapter="p")
        endless = replace(GREEDY, max_tokens=None, ignore_stop_ids=True)
        whole = llm.generate([long], endless, adapter="p")[0].outputs[0]
        assert (whole.finish_reason, len(whole.tokens)) == ("context_full", 180 - len(long))
        llm.unload_adapter("p")
        assert llm.stats().blocks_pinned == 0
        assert llm.generate(TEXT, GREEDY)[0].text == base
        with pytest.raises(ConfigError, match="no adapter 'p'"):
            llm.room("p")


def test_a_session_whose_cache_grows() -> None:
    """A chat in this process, beyond its first blocks and through a second turn: what the training side says."""
    model = build("llama-3")
    adapter = random_adapter(model, "prefix", 21)
    session = PagedSession(model, virtual=virtual_tokens(model, adapter))
    twin = trained(model, adapter)
    ids = tokens(model.config, 300)[0].tolist()
    params = SamplingParams(temperature=0, max_tokens=3)
    for prompt in (ids[:9], [*ids[:9], *ids[50:]]):
        assert list(session.generate(prompt, params)) == greedy(twin, tuple(prompt), 3)[0]
    assert session.max_len == model.config.max_seq_len - 21
