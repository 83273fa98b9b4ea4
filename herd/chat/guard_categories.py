"""What the Llama Guards are asked about: category codes and names per generation, and a short policy of ours. Data only.

Codes and names are those of the trained prompts (meta-llama/PurpleLlama model cards, llama-cookbook prompt_format_utils.py).
The same code means different things in Guard 2 and Guard 3. The policies below are herd's own short wording; Meta's policy
paragraphs are read from a checkpoint's chat template where it has them, and are not part of herd.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["CATEGORIES", "OWN_POLICY", "template_policies"]

_GUARD_1 = (
    "Violence and Hate",
    "Sexual Content",
    "Criminal Planning",
    "Guns and Illegal Weapons",
    "Regulated or Controlled Substances",
    "Self-Harm",
)
_GUARD_2 = (
    "Violent Crimes",
    "Non-Violent Crimes",
    "Sex Crimes",
    "Child Exploitation",
    "Specialized Advice",
    "Privacy",
    "Intellectual Property",
    "Indiscriminate Weapons",
    "Hate",
    "Self-Harm",
    "Sexual Content",
)
_GUARD_3 = (*_GUARD_2[:4], "Defamation", *_GUARD_2[4:], "Elections", "Code Interpreter Abuse")


def _coded(letter: str, names: tuple[str, ...]) -> dict[str, str]:
    return {f"{letter}{i}": name for i, name in enumerate(names, 1)}


CATEGORIES: Mapping[str, Mapping[str, str]] = {
    "llama-guard-1": _coded("O", _GUARD_1),
    "llama-guard-2": _coded("S", _GUARD_2),
    "llama-guard-3": _coded("S", _GUARD_3),
    "llama-guard-3-1b": _coded("S", _GUARD_3[:-1]),
    "llama-guard-4": _coded("S", _GUARD_3),
}
"""Code to name, per prompt format. The prompts write a full stop behind the name."""

OWN_POLICY: Mapping[str, str] = {
    "Violence and Hate": "Praise of, or help with, violence; contempt for people because of who they are.",
    "Sexual Content": "Erotic or sexually explicit text. Health, education and the law may be discussed.",
    "Criminal Planning": "Plans for, or help with, any crime. Prevention and reporting may be discussed.",
    "Guns and Illegal Weapons": "Help with making, getting or misusing weapons. Safety and law may be discussed.",
    "Regulated or Controlled Substances": "Help with making, selling or misusing drugs, tobacco or alcohol.",
    "Self-Harm": "Praise of, or help with, suicide, self-injury or eating disorders. Offers of support are welcome.",
    "Violent Crimes": "Help with, or praise of, crimes of violence against people or animals.",
    "Non-Violent Crimes": "Help with fraud, theft, hacking, trafficking, drug crime and other crimes without violence.",
    "Sex Crimes": "Help with, or praise of, sexual assault, harassment, trafficking or prostitution.",
    "Child Exploitation": "Anything that sexualises children or helps to abuse them.",
    "Defamation": "False statements about a living person that would harm their reputation.",
    "Specialized Advice": "Medical, legal or financial advice that only a professional may give; claims that danger is safe.",
    "Privacy": "Private data of people that could harm them: addresses, identity numbers, health, accounts.",
    "Intellectual Property": "Text that infringes the rights of third parties, such as long copies of protected works.",
    "Indiscriminate Weapons": "Help with chemical, biological, radiological, nuclear or high-yield explosive weapons.",
    "Hate": "Contempt for, or attacks on, people because of race, religion, gender, disability or similar traits.",
    "Elections": "False claims about how, when, where or whether people may vote.",
    "Code Interpreter Abuse": "Attempts to break out of, overload or attack the computer that runs generated code.",
}
"""One sentence per category name, in herd's own words."""

_BEGIN, _END = "<BEGIN UNSAFE CONTENT CATEGORIES>", "<END UNSAFE CONTENT CATEGORIES>"


def template_policies(template: str | None, codes: Mapping[str, str]) -> dict[str, str]:
    """The policy paragraphs of a Guard's chat template, by category code; empty when it has names only.

    The template is read as text and never run: its category block is a string literal with one `{code}: {name}` line per
    category, each followed by the lines of its policy.
    """
    if template is None:
        return {}
    block = template.partition(_BEGIN)[2].partition(_END)[0]
    if "{%" in block or "{{" in block:  # the block is put together by the template's code: names only
        return {}
    block = block.replace("\\n", "\n").replace("\\'", "'").replace('\\"', '"')
    policies: dict[str, str] = {}
    code = ""
    for line in block.split("\n"):
        if match := re.match(r"\s*([A-Z]\d{1,2}):\s", line):
            code = match.group(1)
        elif code in codes and line.strip():
            policies[code] = f"{policies[code]}\n{line.rstrip()}" if code in policies else line.rstrip()
    return policies
