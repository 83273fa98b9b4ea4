"""The slash commands of a chat: a line in, an Answer out. Files are touched by /save and /load only."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from herd.cli import transcript
from herd.cli.conversation import SETTINGS, Conversation
from herd.cli.transcript import Transcript
from herd.errors import HerdError

__all__ = ["Answer", "CommandError", "Commands"]


class CommandError(HerdError, ValueError):
    """A slash command that does not exist or makes no sense here."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command says; `leave` ends the chat, `say` is put to the model as if it had been typed."""

    text: str = ""
    leave: bool = False
    say: str | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its name, how its arguments are written, what it does, and the function that does it."""

    name: str
    usage: str
    summary: str
    call: Callable[[str], Answer]


class Commands:
    """The commands over one conversation. `about` are facts of the model for /show, the model's name under "model"."""

    def __init__(self, conversation: Conversation, about: Mapping[str, str]) -> None:
        self.conversation, self.about = conversation, about
        self.show_rates = True
        """Whether the line with rates and context follows each reply (/set verbose, /set quiet)."""
        table = [
            Command("?", "", "this list (also /help)", self._help),
            Command("system", "[TEXT]", 'show or set the system prompt (/system "" removes it)', self._system),
            Command(
                "set",
                "[NAME VALUE]",
                "show or change settings; /set quiet hides the rates, /set verbose shows them",
                self._set,
            ),
            Command("show", "", "the model, its settings and how full the context is", self._show),
            Command("save", "[-f] FILE", "write the conversation to a file (-f: replace one that exists)", self._save),
            Command("load", "FILE", "go on with a saved conversation", self._load),
            Command("clear", "", "forget the conversation; system prompt and settings stay", self._clear),
            Command("undo", "", "take back the last exchange", self._undo),
            Command("retry", "", "take back the last reply and ask again", self._retry),
            Command("bye", "", "leave (also /exit, /quit, Ctrl-D)", self._bye),
        ]
        self.table = {command.name: command for command in table}
        self._aliases = {"help": "?", "exit": "bye", "quit": "bye", "reset": "clear"}

    @property
    def names(self) -> list[str]:
        """Every command with its slash, for completion."""
        return [f"/{name}" for name in (*self.table, *self._aliases)]

    def run(self, line: str) -> Answer:
        """Carry out `line`, which begins with a slash. Raises HerdError with one clear line."""
        word, _, rest = line[1:].strip().partition(" ")
        command = self.table.get(self._aliases.get(word, word))
        if command is None:
            near = difflib.get_close_matches(f"/{word}", self.names, n=1)
            hint = f"did you mean {near[0]}?" if near else "/? lists them"
            raise CommandError(
                f"no command is called /{word}: {hint} (a space before the slash sends the line as text)"
            )
        return command.call(rest.strip())

    def _help(self, _: str) -> Answer:
        rows = [(f"/{c.name} {c.usage}".rstrip(), c.summary) for c in self.table.values()]
        rows += [
            ('"""', "begin and end a message of several lines (or Alt-Enter for a new line)"),
            ("Ctrl-C", "stop the reply; what was said so far is kept"),
        ]
        return Answer(_columns(rows))

    def _system(self, text: str) -> Answer:
        if not text:
            return Answer(self.conversation.system or "no system prompt")
        self.conversation.set("system", "" if text == '""' else text)
        return Answer("system prompt set" if self.conversation.system else "system prompt removed")

    def _set(self, text: str) -> Answer:
        if not text:
            return Answer(_columns(self._settings()))
        name, _, value = text.partition(" ")
        if name == "parameter":  # Ollama's spelling: /set parameter NAME VALUE
            name, _, value = value.strip().partition(" ")
        value = value.strip()
        if name in ("verbose", "quiet"):
            self.show_rates = name == "verbose"
            return Answer(f"rates are {'shown' if self.show_rates else 'hidden'} after each reply")
        if name == "system":
            return self._system(value)
        if not value:
            raise CommandError(f"/set {name} needs a value")
        key = self.conversation.set(name, value)
        return Answer(f"{key} is {_shown(getattr(self.conversation.params, key))}")

    def _show(self, _: str) -> Answer:
        talk = self.conversation
        used, total = talk.used, talk.model.max_len
        rows = [
            *self.about.items(),
            (
                "context",
                (f"{used:,} of {total:,} tokens used, {total - used:,} left" if total else f"{used:,} tokens used")
                + f", {len(talk.turns)} messages",
            ),
            ("system", talk.system or "none"),
            *self._settings(),
        ]
        return Answer(_columns(rows))

    def _settings(self) -> list[tuple[str, str]]:
        return [(name, _shown(getattr(self.conversation.params, name))) for name in SETTINGS]

    def _save(self, text: str) -> Answer:
        flag, _, rest = text.partition(" ")
        replace = flag == "-f"
        path = _path(rest if replace else text, "/save")
        talk = self.conversation
        existed = path.exists()
        transcript.save(
            path, Transcript(self.about["model"], tuple(talk.turns), talk.system, talk.params), replace=replace
        )
        return Answer(f"{'replaced' if existed else 'wrote'} {path}, {len(talk.turns)} messages")

    def _load(self, text: str) -> Answer:
        path = _path(text, "/load")
        found = transcript.load(path)
        talk = self.conversation
        talk.turns[:], talk.system, talk.params = found.messages, found.system, found.params
        here = self.about["model"]
        other = f" (it was held with {found.model}, and goes on with {here})" if found.model != here else ""
        return Answer(f"read {path}, {len(found.messages)} messages{other}")

    def _clear(self, _: str) -> Answer:
        self.conversation.clear()
        return Answer("the conversation is empty")

    def _undo(self, _: str) -> Answer:
        text = self.conversation.undo()
        if text is None:
            raise CommandError("there is nothing to take back")
        return Answer(f"took back: {text[:60]}{'...' if len(text) > 60 else ''}")

    def _retry(self, _: str) -> Answer:
        text = self.conversation.undo()
        if text is None:
            raise CommandError("there is nothing to try again")
        return Answer(say=text)

    def _bye(self, _: str) -> Answer:
        return Answer(leave=True)


def _path(text: str, command: str) -> Path:
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if not text:
        raise CommandError(f"{command} needs a file name")
    return Path(text).expanduser()


def _shown(value: object) -> str:
    """A setting as /set takes it back."""
    if isinstance(value, tuple):
        return ", ".join(repr(item) for item in value) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _columns(rows: list[tuple[str, str]]) -> str:
    width = max(len(left) for left, _ in rows)
    return "\n".join(f"  {left:<{width}}  {right}" for left, right in rows)
