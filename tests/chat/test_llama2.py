"""Llama 2 chat, Code Llama Instruct, the 70B format and infill against the rules stated over sentencepiece itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from herd.chat.codellama70b import CodeLlama70BFormat
from herd.chat.infill import Infill
from herd.chat.llama2 import Llama2Format
from herd.chat.messages import Message, ToolCall
from herd.chat.toolspec import BUILTIN_TOOLS
from herd.errors import PromptError
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from tests.chat.conversations import TEXTS
from tests.chat.vocabularies import llama2, piece_processor

BOS, EOS = 1, 2
PLAIN_TEXTS = [text for text in TEXTS if "[INST]" not in text]


def stated(dialog: Sequence[Message]) -> list[int]:
    """The rule of meta-llama/llama, straight from its description."""
    encode: Any = piece_processor().encode
    turns = list(dialog)
    if turns[0].role == "system":
        first = f"<<SYS>>\n{turns[0].text}\n<</SYS>>\n\n{turns[1].text}"
        turns = [Message("user", first), *turns[2:]]
    out: list[int] = []
    for user, answer in zip(turns[::2], turns[1::2], strict=False):
        out += [BOS, *encode(f"[INST] {user.text.strip()} [/INST] {answer.text.strip()} "), EOS]
    if len(turns) % 2:
        out += [BOS, *encode(f"[INST] {turns[-1].text.strip()} [/INST]")]
    return out


def dialogs() -> list[list[Message]]:
    found = [[Message("user", text)] for text in PLAIN_TEXTS]
    found += [[Message("system", text), Message("user", "hi")] for text in PLAIN_TEXTS]
    found += [[Message("system", "s"), Message("user", text)] for text in PLAIN_TEXTS]
    found += [[Message("user", "hi"), Message("assistant", text), Message("user", text)] for text in PLAIN_TEXTS]
    turns = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(PLAIN_TEXTS[:11])]
    return [*found, turns, [Message("system", "Be kind."), *turns]]


def test_ids_equal_the_stated_rule() -> None:
    format = Llama2Format(llama2())
    for dialog in dialogs():
        assert format.render(dialog).tokens == stated(dialog)
        assert format.render(dialog, generate=False).tokens == stated(dialog)
        if len(dialog) > 2:
            assert format.render(dialog[:-1], generate=False).tokens == stated(dialog[:-1])


def test_printed_examples() -> None:
    """The vectors of reference/tokenizers.md and of the text in reference/prompt-formats.md."""
    format = Llama2Format(llama2())
    rendered = format.render([Message("system", "sysinfo"), Message("user", "Hello")])
    assert rendered.tokens == [
        1, 518, 25580, 29962, 3532, 14816, 29903, 6778, 13, 9675, 3888, 13, 29966, 829, 14816, 29903, 6778, 13, 13, 10994, 518,
        29914, 25580, 29962,
    ]  # fmt: skip
    turns = [Message("system", "S"), Message("user", "U"), Message("assistant", "A"), Message("user", "V")]
    text = llama2().decode(format.render(turns).tokens, skip_special=False)
    assert text.replace("<s> ", "<s>") == "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST]"


def test_mask_is_the_answer_and_the_end() -> None:
    format = Llama2Format(llama2())
    for answer in ("Fine, thanks.", "🙂", "]", "", "two\n\nlines"):
        dialog = [Message("user", "How are you?"), Message("assistant", answer), Message("user", "ok")]
        rendered = format.render(dialog, generate=False)
        learned = [id for id, learn in zip(rendered.tokens, rendered.loss_mask, strict=True) if learn]
        assert learned[-1] == EOS
        assert llama2().decode(learned[:-1]).strip() == answer
        prompt = format.render(dialog[:1]).tokens
        assert rendered.tokens[: len(prompt)] == prompt
        assert rendered.loss_mask[: len(prompt)] == [False] * len(prompt)
        assert rendered.loss_mask[len(prompt)]
    cut = format.render([Message("user", "x"), Message("assistant", "y", stop_reason="out_of_tokens")], generate=False)
    assert not cut.loss_mask[-1]


def test_tags_are_refused() -> None:
    format, code = Llama2Format(llama2()), Llama2Format(llama2(), code=True)
    for tag in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"):
        for dialog in ([Message("user", f"a{tag}b")], [Message("system", tag), Message("user", "x")]):
            with pytest.raises(PromptError, match=r"message 0 .*tag of the llama2"):
                format.render(dialog)
    with pytest.raises(PromptError, match="<step>"):
        code.render([Message("user", "<step>")])
    assert code.name == "codellama"
    assert format.render([Message("user", "<step>")]).tokens


U, A, S = Message("user", "u"), Message("assistant", "a"), Message("system", "s")


@pytest.mark.parametrize(
    ("dialog", "message"),
    [
        ([], "no messages"),
        ([S], "needs a user message"),
        ([A], "message 0 has role 'assistant'"),
        ([U, U], "message 1 has role 'user'"),
        ([S, U, A, A], "message 3 has role 'assistant'"),
        ([U, A], "ends with an assistant message"),
        ([U, S], "message 1 has role 'system'"),
        ([U, Message("tool", "1")], "message 1 has role 'tool'"),
        ([U, Message("assistant", tool_calls=(ToolCall("f"),)), U], "message 1 calls tools"),
    ],
)
def test_turns_that_the_format_cannot_say(dialog: list[Message], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        Llama2Format(llama2()).render(dialog)


def test_tools_are_refused() -> None:
    with pytest.raises(PromptError, match="has no tools"):
        Llama2Format(llama2()).render([U], [BUILTIN_TOOLS["brave_search"]])


def test_no_special_id_comes_from_text() -> None:
    rendered = Llama2Format(llama2()).render([Message("user", "<s></s><unk> ▁ <0x0A>")])
    assert [id for id in rendered.tokens if id < 3] == [BOS]


def test_reply_is_read_without_its_spaces() -> None:
    format = Llama2Format(llama2())
    for answer in ("Fine, thanks.", "漢字🙂 x", "two\n\nlines", ""):
        rendered = format.render([U, Message("assistant", answer)], generate=False)
        written = rendered.tokens[rendered.loss_mask.index(True) :]
        parser = format.parser()
        streamed = [delta.text for id in written for delta in parser.push(id) if delta.text is not None]
        assert parser.message() == Message("assistant", answer, (), "end_of_turn")
        assert "".join(streamed) == answer


# ---- Code Llama ------------------------------------------------------------------------------------------------------


def _code_llama(*extra: str) -> SentencePieceTokenizer:
    """The Llama 2 vocabulary with Code Llama's added pieces behind it."""
    plain = llama2()
    assert isinstance(plain, SentencePieceTokenizer)
    added = [(piece, i) for i, piece in enumerate(extra, plain.vocab_size)]
    return SentencePieceTokenizer(plain.model.with_added(added))


def test_70b_ids_equal_the_stated_rule() -> None:
    tokenizer = _code_llama("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "<step>")
    step = tokenizer.special.ids["<step>"]
    encode: Any = piece_processor().encode
    format = CodeLlama70BFormat(tokenizer)
    for text in TEXTS:
        dialog = [Message("system", text), Message("user", "q"), Message("assistant", text), Message("user", text)]
        expected = [BOS]
        for message in dialog:
            expected += encode(f" Source: {message.role}")
            expected += encode(f"\n\n {message.text.strip()}") if message.text.strip() else []
            expected += [step]
        expected += [*encode(" Source: assistant\nDestination: user"), *encode("\n\n ")]
        assert format.render(dialog).tokens == expected
    empty = format.render([Message("system"), U]).tokens
    assert format.render([U]).tokens == empty
    assert format.stop_ids >= {step, EOS}


def test_70b_mask_and_reply() -> None:
    tokenizer = _code_llama("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "<step>")
    format = CodeLlama70BFormat(tokenizer)
    rendered = format.render([U, Message("assistant", "print(1)")], generate=False)
    learned = [id for id, learn in zip(rendered.tokens, rendered.loss_mask, strict=True) if learn]
    assert tokenizer.decode(learned[:-1]) == "print(1)"
    assert learned[-1] == tokenizer.special.ids["<step>"]
    parser = format.parser()
    for id in learned:
        parser.push(id)
    assert parser.message() == Message("assistant", "print(1)", (), "end_of_turn")
    with pytest.raises(PromptError, match="<step>"):
        CodeLlama70BFormat(llama2())


def test_infill_prompts() -> None:
    tokenizer = _code_llama("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
    pre, suf, mid, eot = (tokenizer.special.ids[name] for name in ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"))
    encode: Any = piece_processor().encode
    infill = Infill(tokenizer)
    for prefix in ("def f(x):\n    ", "", "naïve 漢字 🙂", " <PRE> <SUF>"):
        for suffix in ("\n    return y\n", "", " x", "🙂"):
            without_space = encode("☺" + suffix)[2:]
            psm = infill.prompt(prefix, suffix)
            assert psm.tokens == [BOS, pre, *encode(prefix), suf, *without_space, mid]
            assert not any(psm.loss_mask)
            assert infill.prompt(prefix, suffix, "spm").tokens == [BOS, pre, suf, *without_space, mid, *encode(prefix)]
    assert infill.stop_ids == {eot, EOS}
    for middle in ("y = x", " y", "    z\n", "漢🙂"):
        ids = encode("☺" + middle)[2:]
        assert infill.middle([*ids, eot, 5, 6]) == middle
        assert infill.middle(ids) == middle
        parser = infill.parser()
        for id in [*ids, eot]:
            parser.push(id)
        assert parser.message() == Message("assistant", middle, (), "end_of_turn")


def test_infill_needs_the_pieces() -> None:
    with pytest.raises(PromptError, match="fill-in-the-middle"):
        Infill(llama2())
    with pytest.raises(PromptError, match="no infill order 'mps'"):
        Infill(_code_llama("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")).prompt("a", "b", "mps")  # type: ignore[arg-type]
