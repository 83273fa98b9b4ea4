"""Quality figures against transformers' logits and plain torch, and llama.cpp's own logits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import herd
from herd.checkpoint.open import open_store
from herd.checkpoint.resolve import resolve
from herd.convert import quality
from herd.convert.quality import check_comparable, measure
from herd.convert.sample import Sample, sample_of, shipped
from herd.errors import ConfigError
from herd.quant.apply import dequantize, quantize
from tests.build import build
from tests.checkpoint.folders import write_hf
from tests.quant.wide import EXPERTS, TIED, WIDE

CONFIGS = {"wide": WIDE, "tied": TIED, "experts": EXPERTS}
FLOATS = 2e-4
"""Relative: float32 logits of two implementations, whose errors of 1e-6 meet differences of 1e-2 between the models."""
DIVERGENCE = 1e-5
"""Absolute, nats: KL is quadratic in the logits' differences, and theirs are uncertain by 1e-6 times their size."""
OF_LLAMA_CPP = 2e-3
"""Relative, of perplexities: llama.cpp computes attention with other roundings (keys and values in float16)."""


def pair(name: str, folder: Path, weights: str = "q4_0"):
    """Two models as folders, B with A's weights rounded to `weights`; transformers' models of both."""
    config = CONFIGS[name]
    model, rounded = build(config), build(config)
    quantize(rounded, weights)
    rounded = dequantize(rounded)
    made = []
    for which, side in (("a", model), ("b", rounded)):
        made.append(write_hf(folder / which, side).eval())
    return open_store(folder / "a"), open_store(folder / "b"), *made, model, rounded


def windows(count: int = 3, length: int = 16) -> Sample:
    ids = torch.randint(WIDE.vocab_size, (count, length), generator=torch.Generator().manual_seed(5))
    return Sample("random ids", ids, count * length)


@pytest.mark.parametrize("name", CONFIGS)
def test_figures_are_those_of_transformers_logits(name: str, tmp_path: Path) -> None:
    a, b, hf_a, hf_b, *_ = pair(name, tmp_path)
    sample = windows()
    found = measure(a, b, sample)
    with torch.no_grad():
        of_a, of_b = (hf(sample.windows).logits.double()[:, 8:-1].flatten(0, 1) for hf in (hf_a, hf_b))
    target = sample.windows[:, 9:].flatten()
    assert found.scored == len(target) == sample.scored == 3 * 7
    for mine, logits in ((found.a, of_a), (found.b, of_b)):
        each = cross_entropy(logits, target, reduction="none")
        assert math.isclose(mine.value, each.mean().exp(), rel_tol=FLOATS)
        assert math.isclose(mine.error, each.mean().exp() * each.std() / len(target) ** 0.5, rel_tol=FLOATS)
    kl = kl_div(log_softmax(of_b, -1), log_softmax(of_a, -1), reduction="none", log_target=True).sum(-1)
    expected = (kl.mean(), kl.median(), kl.quantile(0.99), kl.max())
    for mine, theirs in zip((found.kl.mean, found.kl.median, found.kl.p99, found.kl.max), expected, strict=True):
        assert abs(mine - float(theirs)) <= DIVERGENCE
    assert found.kl.mean > 20 * DIVERGENCE, "the test would see nothing"
    assert found.same_top == pytest.approx(float((of_a.argmax(-1) == of_b.argmax(-1)).double().mean()))


@pytest.mark.parametrize("name", CONFIGS)
def test_errors_of_layers_and_matrices(name: str, tmp_path: Path) -> None:
    a, b, hf_a, hf_b, model, rounded = pair(name, tmp_path)
    sample = windows()
    found = measure(a, b, sample)
    with torch.no_grad():  # the last hidden state of transformers is normed already: layers but the last
        of_a, of_b = (hf(sample.windows, output_hidden_states=True).hidden_states for hf in (hf_a, hf_b))
    for i, layer in enumerate(found.layers[:-1]):
        total = (of_b[i] - of_a[i]).norm() / of_a[i].norm()
        assert math.isclose(layer.total, float(total), rel_tol=FLOATS), layer.name
    assert [layer.name for layer in found.layers] == [
        "embedding",
        *(f"layers.{i}" for i in range(model.config.n_layers)),
    ]
    alone = measure_alone(model, rounded, sample)
    for layer, expected in zip(found.layers[1:], alone, strict=True):
        assert math.isclose(layer.alone, expected, rel_tol=FLOATS), layer.name
    before, after = model.state_dict(), rounded.state_dict()
    assert found.matrices
    for matrix in found.matrices:
        x, y = before[matrix.name].double(), after[matrix.name].double()
        assert math.isclose(matrix.error, float((x - y).norm() / x.norm()), rel_tol=1e-6, abs_tol=1e-12), matrix.name
    names = {m.name for m in found.matrices}
    tied = {"output.weight"} if CONFIGS[name].tie_embeddings else set()
    assert names == {n for n, v in before.items() if v.ndim > 1} - tied


def measure_alone(model, rounded, sample: Sample) -> list[float]:
    """Each layer of B on the input that A's layer gets, with hooks on plain modules."""
    seen: dict[int, tuple] = {}

    def keep(i: int):
        def hook(module, args, out):
            seen[i] = (args, out)

        return hook

    handles = [block.register_forward_hook(keep(i)) for i, block in enumerate(model.layers)]
    with torch.no_grad():
        model(sample.windows)
        for handle in handles:
            handle.remove()
        return [float((rounded.layers[i](*args) - out).norm() / out.norm()) for i, (args, out) in seen.items()]


def test_the_same_model_lost_nothing(tmp_path: Path) -> None:
    a, *_ = pair("wide", tmp_path)
    read = 0

    def tick(nbytes: int) -> None:
        nonlocal read
        read += nbytes

    found = measure(a, a, windows(), tick)
    assert found.kl.mean == found.kl.max == 0.0
    assert found.same_top == 1.0
    assert found.a == found.b
    assert (found.ratio.value, found.ratio.error) == (1.0, 0.0)
    assert not any(layer.total for layer in found.layers)
    assert 0.99 < read / (2 * quality.readings(a)) <= 1, "all but vectors, whose errors are not computed"


def test_slices_of_the_vocabulary_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, *_ = pair("wide", tmp_path)
    whole = measure(a, b, windows())
    monkeypatch.setattr(quality, "SLICE", 7 * 256)  # 260 rows in pieces of 7
    cut = measure(a, b, windows())
    assert abs(whole.kl.max - cut.kl.max) <= 1e-7
    assert whole.same_top == cut.same_top
    assert math.isclose(whole.b.value, cut.b.value, rel_tol=1e-6)


def test_of_equal_logits_the_lowest_id_is_the_choice() -> None:
    sums = quality._LogSum(1)
    sums.add(torch.tensor([[1.0, 3.0, 3.0]]).double(), 0)
    sums.add(torch.tensor([[3.0, 2.0]]).double(), 3)
    assert sums.top.item() == 1
    assert math.isclose(sums.value.item(), torch.tensor([1.0, 3, 3, 3, 2]).double().logsumexp(0).item())


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    write_hf(tmp_path, build(WIDE))
    with pytest.raises(ConfigError, match="vocab_size is 260 in A, 4096 in B"):
        check_comparable(open_store(tmp_path), open_store(resolve("nano")))


def test_windows_of_a_text(tmp_path: Path) -> None:
    tokenizer, config = herd.load_tokenizer("nano"), open_store(resolve("nano")).config
    ids = tokenizer.encode(shipped(), bos=True)
    sample = sample_of(None, tokenizer, config, context=100, windows=3)
    assert sample.windows.tolist() == [
        ids[:100],
        [tokenizer.special.bos, *ids[101:200]],
        [tokenizer.special.bos, *ids[201:300]],
    ]
    assert sample.tokens == len(ids)
    assert (sample.first, sample.scored) == (50, 3 * 49)
    assert sample.notes[1:] == (f"3 of the {len(ids) // 100} windows of the sample text of herd were read",)
    assert sample_of(None, tokenizer, config).windows.shape == (min(16, len(ids) // 512), 512)
    assert "nothing else" in sample.notes[0]
    text = tmp_path / "short.txt"
    text.write_text("A short text.")
    with pytest.raises(ConfigError, match=r"has \d+ tokens, fewer than one window of 512: give a longer --text"):
        sample_of(text, tokenizer, config)
    with pytest.raises(ConfigError, match="4 to 2,048" if config.max_seq_len == 2048 else "4 to"):
        sample_of(None, tokenizer, config, context=config.max_seq_len + 1)
    with pytest.raises(ConfigError, match="cannot be read"):
        sample_of(tmp_path / "absent.txt", tokenizer, config)
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="no UTF-8 text"):
        sample_of(text, tokenizer, config)


@pytest.mark.slow
def test_perplexity_of_llama_cpp(tmp_path: Path, measured) -> None:
    """Its own logits of the same windows, and its tool's definition on them."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    herd.convert("nano", tmp_path / "f32.gguf", to="gguf", dtype="f32", greedy=0)
    herd.convert("nano", tmp_path / "q.gguf", to="gguf", quant="q8_0", greedy=0)
    a, b = open_store(tmp_path / "f32.gguf"), open_store(tmp_path / "q.gguf")
    sample = sample_of(None, herd.load_tokenizer("nano"), a.config, windows=2, context=256)
    found = measure(a, b, sample)
    for path, mine in (("f32.gguf", found.a), ("q.gguf", found.b)):
        model = llama_cpp.Llama(str(tmp_path / path), n_ctx=256, n_batch=256, logits_all=True, verbose=False)
        each = []
        for window in sample.windows:
            model.reset()
            model.eval(window.tolist())
            logits = torch.from_numpy(model.scores[:256].copy()).double()
            each.append(cross_entropy(logits[128:-1], window[129:], reduction="none"))
        theirs = float(torch.cat(each).mean().exp())
        measured("relative difference of perplexities to llama.cpp", path, abs(mine.value / theirs - 1))
        assert math.isclose(mine.value, theirs, rel_tol=OF_LLAMA_CPP if path == "f32.gguf" else 0.02)
