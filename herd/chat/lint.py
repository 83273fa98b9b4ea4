"""A chat template against herd's own renderer: the same conversations through both, and what the differences mean. No torch.

Both write text: the template in the sandbox, the renderer over a vocabulary of characters. Where two ways of writing are at
home (Meta's code, and the templates of the Hugging Face checkpoints), the template is held against both, and the one that it
follows counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from herd.chat.deviations import explain
from herd.chat.format import ChatFormat
from herd.chat.formats import FORMATS, detect, format_named
from herd.chat.letters import Letters
from herd.chat.lint_cases import CASES, SPECIAL_TEXT, Case
from herd.chat.render import render
from herd.chat.sandbox import Outcome, Sandbox
from herd.chat.templates import named_in
from herd.errors import HerdError, PromptError
from herd.tokenizer.tokenizer import Family, Tokenizer

__all__ = ["Finding", "Report", "family_of", "lint"]

DATE = datetime(2024, 7, 26)
"""The day on which templates are rendered: the one that the templates of Llama 3.1 name without a clock."""

Status = Literal["same", "different", "raised", "accepted"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One case. same: equal texts, or both refuse. different: two texts. raised: the template fails where herd writes
    `expected`. accepted: the template writes `got` where herd refuses with `message`.

    `reasons` are names of known deviations (`herd.chat.deviations.MEANINGS`).
    """

    case: str
    status: Status
    expected: str | None = None
    got: str | None = None
    message: str = ""
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """What was found. `format` is the way of writing that the template follows best, `passed` says of each how many cases it
    shares with the template. `refused` is set when the template may not run or is no template; then there are no findings.

    `forged` counts special tokens that a user's text becomes when the prompt is tokenized as templates are. `other_ids`
    names other cases whose text is the same and whose ids differ, which is known only with a checkpoint's tokenizer.
    """

    format: str
    passed: Mapping[str, int]
    findings: tuple[Finding, ...] = ()
    refused: Outcome | None = None
    forged: int = 0
    other_ids: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every case is the same."""
        return self.refused is None and all(finding.status == "same" for finding in self.findings)


def lint(
    template: str,
    sandbox: Sandbox,
    *,
    format: str | None = None,
    tokenizer: Tokenizer | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Report:
    """Hold `template` against the prompt format `format` (else the one that its text shows), over all CASES.

    `tokenizer`, the checkpoint's own, adds the comparison of ids. `tick` is called after every case. A template that the sandbox
    refuses is a report, of whatever format it is. Raises PromptError when there is no text, or no format that it shows.
    """
    if not template.strip():
        raise PromptError("the chat template is empty")
    try:
        named = _named(template, tokenizer) if format is None else format
    except PromptError:
        checked = sandbox.check(template)
        if checked.kind == "text":
            raise
        return Report("unknown", {}, refused=checked)
    if named not in FORMATS or named == "base":
        raise PromptError(
            f"there is no prompt format {named!r} with conversations; choose one of {', '.join(_chats())}"
        )
    names = [named] if format is not None else _candidates(named)
    checked = sandbox.check(template)
    if checked.kind != "text":
        return Report(named, dict.fromkeys(names, 0), refused=checked)
    letters = Letters(family_of(named))
    written = []
    for case in CASES:
        outcome = _written(template, sandbox, case, letters)
        if outcome.kind in ("refused", "stopped"):
            return Report(named, dict.fromkeys(names, 0), refused=outcome)
        written.append(outcome)
        tick()
    found = {name: _findings(format_named(name, letters), written, letters) for name in names}
    passed = {name: sum(finding.status == "same" for finding in findings) for name, findings in found.items()}
    best = max(names, key=lambda name: (passed[name], -sum(len(finding.reasons) for finding in found[name])))
    return Report(
        best,
        passed,
        tuple(found[best]),
        forged=_forged(written, letters),
        other_ids=() if tokenizer is None else _other_ids(best, tokenizer, written),
    )


def family_of(format: str) -> Family:
    """The vocabulary family in which a format is at home."""
    if format in ("llama2", "llama-guard-1"):
        return "llama2"
    if format.startswith("codellama"):
        return "codellama"
    return "llama4" if format in ("llama4", "llama4-hf", "llama-guard-4") else "llama3"


def _chats() -> list[str]:
    return [name for name in FORMATS if name != "base"]


def _candidates(name: str) -> list[str]:
    """The ways of writing that share the tokens of a format: Meta's, and that of the Hugging Face checkpoints."""
    base = name.removesuffix("-hf")
    if base in ("llama3.1", "llama3.2", "llama3.3"):
        return [base, "llama3.1-hf"]
    return [base, f"{base}-hf"] if f"{base}-hf" in FORMATS else [base]


def _named(template: str, tokenizer: Tokenizer | None) -> str:
    """The format that a template's text shows, in the tokenizer's family where there is one, else in any."""
    named = named_in(template)
    if named is not None and named in FORMATS:
        return named
    families: Sequence[Family] = ("llama4", "llama3", "codellama", "llama2")
    if tokenizer is not None:
        families = (tokenizer.family,)
    for family in families:
        letters = Letters(family)
        letters.template = template
        try:
            name = detect(letters).name
        except HerdError:
            continue
        # Over the stand-in every vocabulary of SentencePiece pieces looks like Code Llama's.
        return "llama2" if name == "codellama" and tokenizer is None else name
    raise PromptError(
        f"the template is of no Llama format that herd knows: name one with --format, one of {', '.join(_chats())}"
    )


def _written(template: str, sandbox: Sandbox, case: Case, letters: Letters) -> Outcome:
    special = letters.special
    variables: dict[str, Any] = {
        "messages": list(case.messages),
        "tools": list(case.tools) or None,
        "documents": None,
        "add_generation_prompt": case.generate,
        "bos_token": letters.piece(special.bos),
        "eos_token": letters.piece(special.eos),
    }
    return sandbox.run(template, variables, now=DATE)


def _findings(format: ChatFormat, written: Sequence[Outcome], letters: Letters) -> list[Finding]:
    return [_finding(format, case, outcome, letters) for case, outcome in zip(CASES, written, strict=True)]


def _finding(format: ChatFormat, case: Case, outcome: Outcome, letters: Letters) -> Finding:
    message = ""
    try:
        rendered = render(case.messages, format, case.tools, generate=case.generate)
        expected = letters.decode(rendered.tokens, skip_special=False)
    except PromptError as error:
        expected, message = None, str(error)
    got = outcome.text if outcome.kind == "text" else None
    if got == expected:
        return Finding(case.name, "same", expected, got, message)
    status: Status = "raised" if got is None else "accepted" if expected is None else "different"
    reasons = explain(case, expected, got, outcome, letters)
    return Finding(case.name, status, expected, got, message or outcome.explain(), reasons)


def _forged(written: Sequence[Outcome], letters: Letters) -> int:
    """How many special tokens SPECIAL_TEXT becomes when the template's text is tokenized."""
    known = {id for id in letters.encode(SPECIAL_TEXT, allow_special=True) if id in letters.special.ids.values()}
    for case, outcome in zip(CASES, written, strict=True):
        at = outcome.text.find(SPECIAL_TEXT)
        if case.name.startswith("special tokens") and at >= 0:
            return sum(id in known for id in letters.encode(SPECIAL_TEXT, allow_special=True))
    return 0


def _other_ids(name: str, tokenizer: Tokenizer, written: Sequence[Outcome]) -> tuple[str, ...]:
    """Cases whose ids from the template's text are not those of the renderer though the text is the same."""
    format = format_named(name, tokenizer)
    letters = Letters(family_of(name))
    stand_in = format_named(name, letters)
    others = []
    for case, outcome in zip(CASES, written, strict=True):
        if SPECIAL_TEXT in outcome.text:
            continue  # `forged` tells
        try:
            ours = render(case.messages, format, case.tools, generate=case.generate).tokens
            text = letters.decode(
                render(case.messages, stand_in, case.tools, generate=case.generate).tokens, skip_special=False
            )
        except PromptError:
            continue
        if outcome.text == text and tokenizer.encode(text, allow_special=True) != ours:
            others.append(case.name)
    return tuple(others)
