"""The loop of a chat: read a message or a command, answer it, again. Replies go to stdout, all else to stderr."""

from __future__ import annotations

import sys

from herd.chat.messages import Message
from herd.cli.commands import Commands
from herd.cli.console import note, styled
from herd.cli.conversation import Conversation
from herd.cli.lines import Lines
from herd.cli.reply import ReplyView, ending, rates
from herd.errors import ContextFullError, HerdError

__all__ = ["Repl"]

NEARLY_FULL = 0.15
"""Share of the context below which what is left is shown as a warning."""


class Repl:
    """A conversation, its commands and where its lines come from. `live` shows the rate while a reply is made."""

    def __init__(self, conversation: Conversation, commands: Commands, lines: Lines, *, live: bool) -> None:
        self.conversation, self.commands, self.lines = conversation, commands, lines
        self.view = ReplyView(conversation, live=live)

    def greet(self) -> None:
        """What a person sees first."""
        about = self.commands.about
        size = f", {about['parameters']} parameters" if "parameters" in about else ""
        length = self.conversation.model.max_len
        note(f"{about['model']}{size}{f', context {length:,} tokens' if length else ''}.")
        if self.conversation.apart:
            note("It judges each message on its own; herd run MODEL --messages FILE judges the end of a conversation.")
        note("Type a message. /? lists the commands, Ctrl-C stops a reply, Ctrl-D leaves.")

    def loop(self) -> int:
        """Until the input ends or /bye; how many lines failed."""
        failures = 0
        while True:
            try:
                line = self.lines.read()
            except KeyboardInterrupt:
                note("[Ctrl-D or /bye leaves]")
                continue
            if line is None:
                return failures
            try:
                if self._answer(line):
                    return failures
            except HerdError as error:
                failures += 1
                self._complain(error)

    def _answer(self, line: str) -> bool:
        """Deal with one line; whether to leave."""
        if not line.startswith("/"):
            if line.strip():
                self._say(line.strip())
            return False
        before = list(self.conversation.turns)
        answer = self.commands.run(line)
        if answer.text:
            print(answer.text, file=sys.stderr)
        if answer.say is not None:
            self._say_again(answer.say, before)
        return answer.leave

    def _say(self, text: str) -> bool:
        """One exchange; whether it became part of the conversation."""
        outcome = self.view.say(text)
        if outcome is None:
            note("[stopped before the model began]")
            return False
        for line in outcome.reply.notes:
            note(f"[{line}]")
        if why := ending(outcome, self.conversation.params.max_tokens):
            note(why)
        if self.commands.show_rates:
            total = self.conversation.model.max_len
            note(rates(outcome, total), "yellow" if total - outcome.used < total * NEARLY_FULL else "dim")
        return outcome.kept

    def _say_again(self, text: str, before: list[Message]) -> None:
        """An exchange in the place of the last one of `before`, which comes back when there is no new one."""
        kept = False
        try:
            kept = self._say(text)
        finally:
            if not kept:
                self.conversation.turns[:] = before

    def _complain(self, error: HerdError) -> None:
        line = " ".join(str(error).split())
        if isinstance(error, ContextFullError):
            line = (
                f"the context is full: with this message the conversation needs {error.needed:,} tokens, and there are "
                f"{error.available:,}. /undo takes back the last exchange, /clear starts over"
            )
        print(styled("herd:", "red", sys.stderr), line, file=sys.stderr, flush=True)
