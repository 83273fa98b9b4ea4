"""The model that ships: herd/embedded/nano loads, fits its limits, answers and stops."""

import json
from pathlib import Path

import pytest
import torch

import herd
from herd.chat.formats import detect
from herd.chat.messages import Message
from herd.chat.params import SamplingParams
from herd.checkpoint.load import load
from herd.engine.session import Session

FOLDER = Path(herd.__file__).parent / "embedded" / "nano"


@pytest.fixture(scope="module")
def nano():
    return load(FOLDER, dtype=torch.float32)


def reply(nano, text, **sampling):
    model, tokenizer = nano
    format = detect(tokenizer)
    prompt = format.render([Message("user", text)]).tokens
    params = SamplingParams(max_tokens=400, seed=1, **sampling)
    ids = list(Session(model).generate(prompt, params, format.stop_ids))
    assert ids[-1] in format.stop_ids, f"no end after {len(ids)} tokens"
    return tokenizer.decode(ids[:-1])


def test_the_folder_is_small_and_complete():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(sizes.values()) < 40e6
    assert {
        "README.md",
        "ATTRIBUTION.md",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    } <= set(sizes)


def test_the_format_is_found(nano):
    assert detect(nano[1]).name == "llama3"
    assert nano[0].config.tie_embeddings


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("what is the colour of the sky", "blue"),
        ("how many legs does a cat have", "four"),
        ("Who are you?", "herd-nano"),
        ("tell me a story about a dog", "dog"),
        ("hello", "Hello"),
        ("Who won the world cup in 1998?", "not know"),
    ],
)
def test_it_answers_and_stops(nano, text, word):
    assert word in reply(nano, text, temperature=0.0)


def test_it_stops_when_sampled_as_recommended(nano):
    settings = json.loads((FOLDER / "generation_config.json").read_text())
    for text in ("tell me a story about a cat", "Tell me a story about a little girl.", "how are you"):
        assert len(reply(nano, text, temperature=settings["temperature"], top_p=settings["top_p"])) > 3


def test_transformers_agrees(nano):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = nano
    other = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    auto = transformers.AutoTokenizer.from_pretrained(FOLDER)
    text = "Once upon a time there was a dog named Max. He couldn't find 12 bones!\n\n"
    ids = tokenizer.encode(text, bos=True)
    assert auto.encode(text) == ids
    conversation = [{"role": "user", "content": text}]
    rendered = auto.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert detect(tokenizer).render([Message("user", text)]).tokens == rendered
    with torch.no_grad():
        torch.testing.assert_close(other(torch.tensor([ids])).logits, model(torch.tensor([ids])), rtol=0, atol=1e-4)
