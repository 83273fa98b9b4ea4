"""Records to examples: token ids and, for each, the token to predict after it (or IGNORE).

Labels are shifted here, once: `labels[i]` is the target of the model's output at position i. Nothing later shifts again.
What a prompt format writes is tokenised by the format itself (`ChatFormat.render`), so what is trained is what is served:
`check_prompts` proves it of a conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from herd.chat.format import ChatFormat
from herd.data.records import ChatRecord, CompletionRecord, Record, TextRecord
from herd.errors import DataError, HerdError
from herd.tokenizer.tokenizer import Tokenizer

__all__ = [
    "IGNORE",
    "Example",
    "FormatError",
    "NothingLearned",
    "check_prompts",
    "encode",
    "encode_text",
    "from_mask",
]

IGNORE = -100
"""Label of a position that is not learned from (torch's cross_entropy default)."""


NO_FORMAT = "a conversation needs a prompt format: name one with data.chat_format (herd data: --format)"


class NothingLearned(DataError):
    """A row in which no token carries loss."""


class FormatError(DataError):
    """A prompt format that is none to train with: no single row is at fault."""


@dataclass(frozen=True, slots=True)
class Example:
    """One document or conversation: `tokens` and `labels` of equal length."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.labels):
            raise DataError(f"{len(self.tokens)} tokens but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def learned(self) -> int:
        """Number of positions that carry loss."""
        return len(self.labels) - self.labels.count(IGNORE)


def from_mask(tokens: Sequence[int], learned: Sequence[bool | int]) -> Example:
    """An example from ids and a mask of the ids to be produced: position i learns token i+1 where `learned[i+1]`."""
    if len(tokens) != len(learned):
        raise DataError(f"{len(tokens)} tokens but a loss mask of {len(learned)}")
    labels = [token if wanted else IGNORE for token, wanted in zip(tokens[1:], learned[1:], strict=True)]
    return Example(tuple(tokens), (*labels, IGNORE) if tokens else ())


def encode_text(ids: Sequence[int], *, bos: int, eos: int) -> Example:
    """A document: bos, its ids, eos; every token after bos is learned."""
    tokens = (bos, *ids, eos)
    return Example(tokens, (*tokens[1:], IGNORE))


def encode(record: Record, tokenizer: Tokenizer, format: ChatFormat | None) -> Example:
    """What a next-token objective learns of `record`; nothing is cut.

    Text: bos, the text, eos; all but bos is learned. A prompt with its completion: bos, prompt, completion, eos, each text
    tokenised on its own as a server would have it; completion and eos are learned. A conversation: `format` renders it, and
    the assistant's turns are learned (those after the first `given` messages). Raises DataError for other records, for a
    conversation without a format, when there is nothing to learn, and with the format's reason when it cannot be rendered.
    """
    bos, eos = tokenizer.special.bos, tokenizer.special.eos
    try:
        if isinstance(record, TextRecord):
            example = encode_text(tokenizer.encode(record.text), bos=bos, eos=eos)
        elif isinstance(record, CompletionRecord):
            prompt = [bos, *tokenizer.encode(record.prompt)]
            tokens = [*prompt, *tokenizer.encode(record.completion), eos]
            example = from_mask(tokens, [i >= len(prompt) for i in range(len(tokens))])
        elif isinstance(record, ChatRecord):
            example = _conversation(record, format)
        else:
            raise DataError(
                f"a {type(record).__name__} is not for next-token training: give text, chat or completion rows"
            )
    except DataError:
        raise
    except HerdError as error:
        raise DataError(str(error)) from error
    if not example.learned:
        raise NothingLearned(
            "no token is learned: it has no words of an assistant, or the format's loss mask covers them all"
        )
    return example


def _conversation(record: ChatRecord, format: ChatFormat | None) -> Example:
    if format is None:
        raise FormatError(NO_FORMAT)
    rendered = format.render(record.messages, record.tools, generate=False)
    mask = rendered.loss_mask
    if record.given:
        prompt = format.render(record.messages[: record.given], record.tools, generate=True).tokens
        if rendered.tokens[: len(prompt)] != prompt:
            raise DataError(
                f"the first {record.given} messages are rendered otherwise as a prompt than in the conversation"
            )
        mask = [learned and i >= len(prompt) for i, learned in enumerate(mask)]
    return from_mask(rendered.tokens, mask)


def check_prompts(record: ChatRecord, format: ChatFormat) -> None:
    """Hold what is learned against what is served; FormatError when they differ.

    For each assistant message that is learned: the ids of the conversation begin with the ids of the prompt that a server
    would render before that message, and what follows, to the end of the message, is exactly what is learned.
    """
    messages, tools = record.messages, record.tools
    whole = format.render(messages, tools, generate=False)
    expected = set[int]()
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = format.render(messages[:i], tools, generate=True).tokens
        done = format.render(messages[: i + 1], tools, generate=False).tokens
        if whole.tokens[: len(prompt)] != prompt or whole.tokens[: len(done)] != done:
            raise FormatError(
                f"message {i}: the {format.name} format renders what comes before it otherwise in training than when served; "
                "it is no format to train conversations with"
            )
        expected.update(range(len(prompt), len(done)))
    if expected != {i for i, learned in enumerate(whole.loss_mask) if learned}:
        raise FormatError(
            f"the loss mask of the {format.name} format is not what the assistant says in this conversation"
        )
