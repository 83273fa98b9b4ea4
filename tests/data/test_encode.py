import gzip
import json
from functools import cache
from pathlib import Path

import pytest

from herd.chat.formats import FORMATS, format_named
from herd.chat.messages import Message
from herd.data.adapt import records
from herd.data.encode import IGNORE, FormatError, check_prompts, encode
from herd.data.records import ChatRecord, CompletionRecord, PreferenceRecord, TextRecord
from herd.errors import DataError
from herd.tokenizer.files import load_tokenizer
from herd.tokenizer.tokenizer import Tokenizer
from tests.conftest import shared_path
from tests.data.corpus import chat_format, tokenizer


@cache
def released(family) -> Tokenizer:
    return load_tokenizer(shared_path(f"data/tokenizers/{family}.tokenizer.model"))


def learned(example) -> str:
    return tokenizer().decode([label for label in example.labels if label != IGNORE], skip_special=False)


def test_a_text_is_learned_from_its_first_word_to_its_end():
    example = encode(TextRecord("the cat"), tokenizer(), None)
    special = tokenizer().special
    assert example.tokens == (special.bos, *tokenizer().encode("the cat"), special.eos)
    assert example.labels == (*example.tokens[1:], IGNORE)


def test_of_a_completion_the_completion_is_learned():
    example = encode(CompletionRecord("the cat ", "ran home"), tokenizer(), None)
    special = tokenizer().special
    prompt = (special.bos, *tokenizer().encode("the cat "))
    assert example.tokens[: len(prompt)] == prompt  # what a server would be sent
    assert learned(example) == "ran home" + tokenizer().piece(special.eos)
    assert encode(CompletionRecord("", "x"), tokenizer(), None).learned == 2


def test_of_a_conversation_the_replies_are_learned():
    record = ChatRecord.pairs("hello", "hi there", "and now", "good bye")
    text = learned(encode(record, tokenizer(), chat_format()))
    assert text.replace("<|eot_id|>", "|") == "hi there|good bye|"


def test_messages_that_are_given_are_not_learned():
    record = ChatRecord.pairs("hello", "hi there", "and now", "good bye")
    given = ChatRecord(record.messages, given=3)
    assert learned(encode(given, tokenizer(), chat_format())).replace("<|eot_id|>", "|") == "good bye|"
    assert encode(given, tokenizer(), chat_format()).tokens == encode(record, tokenizer(), chat_format()).tokens


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (ChatRecord((Message("user", "hi"),)), "no token is learned"),
        (ChatRecord(ChatRecord.pairs("a", "b").messages, given=2), "no token is learned|rendered otherwise"),
        (PreferenceRecord("a", "b", "c"), "a PreferenceRecord is not for next-token training"),
        (TextRecord("half a pair \ud800"), "lone surrogate"),
    ],
)
def test_what_cannot_be_learned_is_refused(record, message):
    with pytest.raises(DataError, match=message):
        encode(record, tokenizer(), chat_format())


def test_a_conversation_needs_a_format():
    with pytest.raises(FormatError, match="needs a prompt format"):
        encode(ChatRecord.pairs("a", "b"), tokenizer(), None)


OF_FAMILY = {
    "llama2": ["llama2", "codellama"],
    "llama3": ["llama3", "llama3.1", "llama3.2", "llama3.3", "llama3-hf", "llama3.1-hf"],
    "llama4": ["llama4", "llama4-hf"],
}
WITHOUT_TOOLS = {"llama2", "codellama", "llama3", "llama3-hf"}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in OF_FAMILY.items() for name in names])
def test_real_conversations_are_learned_as_they_are_served(shared, family, name):
    """Plain, long and tool conversations: prompts are prefixes of what is trained, and replies are all that is learned."""
    format = format_named(name, released(family))
    checked = 0
    for file in ("dolly_subset", "gsm8k_train", "tools_sgd_train", "tools_glaive_demo"):
        for i, record in enumerate(records(shared(f"data/sft/{file}.jsonl.gz"))):
            if i == 6:
                break
            assert isinstance(record, ChatRecord)
            if record.tools and name in WITHOUT_TOOLS:
                with pytest.raises(DataError, match="tools"):
                    encode(record, format.tokenizer, format)
                continue
            check_prompts(record, format)
            example = encode(record, format.tokenizer, format)
            replies = [m for m in record.messages if m.role == "assistant"]
            # Nothing of what the user, the system or a tool says is learned: count the ends of replies among the labels.
            assert sum(label in format.stop_ids for label in example.labels) == len(replies)
            checked += 1
    assert checked >= 12


def test_formats_that_serve_other_prompts_than_they_train_are_refused():
    """The Guards: what they are asked is a question about a conversation, not the conversation."""
    guards = [name for name in FORMATS if "guard" in name]
    assert guards
    family = {"llama-guard-1": "llama2", "llama-guard-4": "llama4"}
    for name in guards:
        vocabulary = released(family.get(name, "llama3"))
        with pytest.raises(FormatError, match="no format to train conversations with"):
            check_prompts(ChatRecord.pairs("hello", "hi"), format_named(name, vocabulary))


def test_the_mask_equals_that_of_the_published_template(shared):
    """transformers' own template of Llama 3 and its vocabulary, cut by hand at the headers: the same ids, the same replies."""
    from transformers import AutoTokenizer

    import herd

    theirs = AutoTokenizer.from_pretrained(Path(herd.__file__).parent / "embedded/nano")
    with gzip.open(shared("data/sft/dolly_subset.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(5)]
    for row in rows:
        ids = theirs.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        record = ChatRecord(tuple(Message(m["role"], m["content"]) for m in row["messages"]))
        example = encode(record, tokenizer(), chat_format())
        assert list(example.tokens) == ids
        reply = theirs.encode(row["messages"][-1]["content"].strip(), add_special_tokens=False)
        text = [label for label in example.labels if label != IGNORE]
        assert text[: len(reply)] == reply
        assert len(text) == len(reply) + 1
