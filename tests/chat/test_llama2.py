"""Llama 2 chat, Code Llama Instruct, the 70B format and infill against the rules stated over sentencepiece itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from herd.chat.codellama70b import CodeLlama70BFormat
from herd.chat.infill import Infill
from herd.chat.llama2 import Llama2Format
from herd.chat.messages import Message, ToolCall
from herd.chat.toolspec import BUILTIN_TOOLS
from herd.errors import PromptError
from tests.chat.conversations import TEXTS
from tests.vocabularies import Pieces

BOS, EOS = 1, 2
PLAIN_TEXTS = [text for text in TEXTS if "[INST]" not in text]


def stated(pieces: Pieces, dialog: Sequence[Message]) -> list[int]:
    """The rule of meta-llama/llama, straight from its description."""
    encode = pieces.library.encode
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


def test_ids_equal_the_stated_rule(pieces: Pieces) -> None:
    format = Llama2Format(pieces.tokenizer)
    for dialog in dialogs():
        assert format.render(dialog).tokens == stated(pieces, dialog)
        assert format.render(dialog, generate=False).tokens == stated(pieces, dialog)
        if len(dialog) > 2:
            assert format.render(dialog[:-1], generate=False).tokens == stated(pieces, dialog[:-1])


def test_printed_examples(released: Pieces) -> None:
    """Ids and text that Llama 2's own vocabulary is known to give."""
    format = Llama2Format(released.tokenizer)
    rendered = format.render([Message("system", "sysinfo"), Message("user", "Hello")])
    assert rendered.tokens == [
        1, 518, 25580, 29962, 3532, 14816, 29903, 6778, 13, 9675, 3888, 13, 29966, 829, 14816, 29903, 6778, 13, 13, 10994, 518,
        29914, 25580, 29962,
    ]  # fmt: skip
    turns = [Message("system", "S"), Message("user", "U"), Message("assistant", "A"), Message("user", "V")]
    text = released.tokenizer.decode(format.render(turns).tokens, skip_special=False)
    assert text.replace("<s> ", "<s>") == "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST]"


def test_mask_is_the_answer_and_the_end(pieces: Pieces) -> None:
    format = Llama2Format(pieces.tokenizer)
    for answer in ("Fine, thanks.", "🙂", "]", "", "two\n\nlines"):
        dialog = [Message("user", "How are you?"), Message("assistant", answer), Message("user", "ok")]
        rendered = format.render(dialog, generate=False)
        learned = [id for id, learn in zip(rendered.tokens, rendered.loss_mask, strict=True) if learn]
        assert learned[-1] == EOS
        assert pieces.tokenizer.decode(learned[:-1]).strip() == answer
        prompt = format.render(dialog[:1]).tokens
        assert rendered.tokens[: len(prompt)] == prompt
        assert rendered.loss_mask[: len(prompt)] == [False] * len(prompt)
        assert rendered.loss_mask[len(prompt)]
    cut = format.render([Message("user", "x"), Message("assistant", "y", stop_reason="out_of_tokens")], generate=False)
    assert not cut.loss_mask[-1]


def test_tags_are_refused(pieces: Pieces) -> None:
    format, code = Llama2Format(pieces.tokenizer), Llama2Format(pieces.tokenizer, code=True)
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
def test_turns_that_the_format_cannot_say(pieces: Pieces, dialog: list[Message], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        Llama2Format(pieces.tokenizer).render(dialog)


def test_tools_are_refused(pieces: Pieces) -> None:
    with pytest.raises(PromptError, match="has no tools"):
        Llama2Format(pieces.tokenizer).render([U], [BUILTIN_TOOLS["brave_search"]])


def test_no_special_id_comes_from_text(pieces: Pieces) -> None:
    rendered = Llama2Format(pieces.tokenizer).render([Message("user", "<s></s><unk> ▁ <0x0A>")])
    assert [id for id in rendered.tokens if id < 3] == [BOS]


def test_reply_is_read_without_its_spaces(pieces: Pieces) -> None:
    format = Llama2Format(pieces.tokenizer)
    for answer in ("Fine, thanks.", "漢字🙂 x", "two\n\nlines", ""):
        rendered = format.render([U, Message("assistant", answer)], generate=False)
        written = rendered.tokens[rendered.loss_mask.index(True) :]
        parser = format.parser()
        streamed = [delta.text for id in written for delta in parser.push(id) if delta.text is not None]
        assert parser.message() == Message("assistant", answer, (), "end_of_turn")
        assert "".join(streamed) == answer


# ---- Code Llama ------------------------------------------------------------------------------------------------------


def test_70b_ids_equal_the_stated_rule(pieces: Pieces) -> None:
    tokenizer = pieces.with_added("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "<step>")
    step = tokenizer.special.ids["<step>"]
    encode = pieces.library.encode
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


def test_70b_mask_and_reply(pieces: Pieces) -> None:
    tokenizer = pieces.with_added("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "<step>")
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
        CodeLlama70BFormat(pieces.tokenizer)


def test_infill_prompts(pieces: Pieces) -> None:
    tokenizer = pieces.with_added("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
    pre, suf, mid, eot = (tokenizer.special.ids[name] for name in ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"))
    encode = pieces.library.encode
    infill = Infill(tokenizer)
    for prefix in ("def f(x):\n    ", "", "naïve 漢字 🙂", " <PRE> <SUF>"):
        for suffix in ("\n    return y\n", "", " x", "🙂"):
            without_space = encode("☺" + suffix)[len(encode("☺")) :]
            psm = infill.prompt(prefix, suffix)
            assert psm.tokens == [BOS, pre, *encode(prefix), suf, *without_space, mid]
            assert not any(psm.loss_mask)
            assert infill.prompt(prefix, suffix, "spm").tokens == [BOS, pre, suf, *without_space, mid, *encode(prefix)]
    assert infill.stop_ids == {eot, EOS}
    for middle in ("y = x", " y", "    z\n", "漢🙂"):
        ids = encode("☺" + middle)[len(encode("☺")) :]
        assert infill.middle([*ids, eot, 5, 6]) == middle
        assert infill.middle(ids) == middle
        parser = infill.parser()
        for id in [*ids, eot]:
            parser.push(id)
        assert parser.message() == Message("assistant", middle, (), "end_of_turn")


def test_infill_needs_the_pieces(pieces: Pieces) -> None:
    with pytest.raises(PromptError, match="fill-in-the-middle"):
        Infill(pieces.tokenizer)
    with pytest.raises(PromptError, match="no infill order 'mps'"):
        Infill(pieces.with_added("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")).prompt("a", "b", "mps")  # type: ignore[arg-type]
