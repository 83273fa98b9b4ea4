"""Which language a text is in, by its script and its commonest words. No torch, no model, no download.

Latin script: the language whose function words (articles, pronouns, prepositions) make up the largest share of the words; a word
that several languages have counts for each of them in part. Other scripts: the script decides, with a few letters that only one
of its languages has.

What this cannot do: texts of fewer than some ten words, word lists, verse in dialect, and code are often "und" (undetermined);
languages that are not in the tables are "und", or taken for their nearest kin (Galician for Portuguese or Spanish, Norwegian for
Danish, Marathi and Nepali for Hindi, Persian with Arabic letters only for Arabic, Bulgarian and Serbian for Russian); a text in
two languages gets the one with more of it. Where a few per cent of wrong tags matter, use a trained model and filter by its tag.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from herd.data.words import words

__all__ = ["LANGUAGES", "UNDETERMINED", "Tag", "language"]

UNDETERMINED = "und"

LOOKED_AT = 4000
"""Characters that decide, from the middle of a longer text: beginnings are titles and notices."""

ENOUGH = 0.12
"""Share of words that must be function words of the language. Running text has 0.3 to 0.5; names and code have few."""

AHEAD = 1.15
"""How much more of them than the next language has."""

_COMMON: Mapping[str, str] = {
    "en": "the of and to in is was that for it with as his on be at by had not are but from or have an they which one you were "
    "all her she there would their we him been has when who will more no if out so what up said its about than into them can "
    "only other time some could these may do my he this your how did",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er hat dass "
    "sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur oder aber vor zur bis mehr durch man sein "
    "wurde sei ich ihr wir du mir mich uns wenn doch da was seine kann ihre diese",
    "fr": "de la le et les des en un du une que est pour qui dans par plus au ne pas sur se il ce avec elle sont ont été aux "
    "mais ou son sa ses cette comme nous vous je leur y été était avait si tout ces on même aussi être fait bien sans peut d l "
    "qu n s c j où lui deux mon très",
    "es": "de la que el en y a los se del las un por con no una su para es al lo como más o pero sus le ha me si sin sobre este "
    "ya entre cuando todo esta ser son dos también fue había era muy años hasta desde está mi porque qué sólo han yo hay vez "
    "puede todos así nos ni parte tiene él uno donde",
    "it": "di e il la che in a per un del è non una i le con si da al dei sono come più della nel alla lo gli anche ma o se su "
    "ha delle era suo ci cui sua questo dal nella ed dalla degli alle così essere stato quando perché sul aveva tutto mi io "
    "quella quello chi due fra tra noi hanno l d dell all",
    "pt": "de a o que e do da em um para é com não uma os no se na por mais as dos como mas foi ao ele das tem à seu sua ou ser "
    "quando muito há nos já está eu também só pelo pela até isso ela entre era depois sem mesmo aos ter seus quem nas me esse "
    "eles estão você tinha foram essa num nem suas meu às minha são você",
    "nl": "de en van het een in is dat op te zijn met voor niet aan er om ook als dan maar bij uit nog naar door over ze zich "
    "hij was worden wordt deze die tot heeft hebben werd kan of geen meer al ik je haar hem zo wat moet onder veel zou we wel "
    "dit deze toen mijn waren daar",
    "sv": "och i att det som en på är av för med till den har de inte om ett han men var jag sig från vi så kan man när år hon "
    "under också efter eller nu sin där vid mot ska skulle kommer ut får finns vara hade alla andra mycket då sedan dem bara "
    "blev hans över",
    "da": "og i at det er en til af på for med som ikke der den de har et om han var fra men jeg sig kan vi så man eller ved "
    "efter også nu blev hun hvor være været når skal vil ud mod sin hans alle over havde under få ind kun meget hvad op os",
    "pl": "i w nie się na z do to że jest o jak od po przez co ale za tym być ma już tak dla czy przy tylko może oraz był są "
    "jego które który jej ich tego która sobie było bardzo kiedy ze by pod nawet jeszcze lub gdy wszystko mnie",
    "ro": "de și în la a cu pe o că din nu se un este mai pentru care ce al ca fi sunt dar au fost sau prin după sale acest "
    "această fără între lui ei ale când dacă foarte mult iar are fiind către cel cea cele",
    "tr": "bir ve bu da de için ile çok o olarak daha gibi olan ne kadar sonra var ama ben en her mi değil olduğu ya ise kendi "
    "diye iki şey yok oldu onun ki benim sen bunu nasıl göre kadar zaman hiç",
    "id": "yang dan di itu dengan untuk tidak ini dari dalam akan pada juga saya ke karena tersebut bisa ada mereka lebih kata "
    "sudah atau saat oleh menjadi orang ia telah adalah seperti sebagai bahwa dapat para harus kami kita anda hanya",
    "vi": "và của là có không được cho một các trong người với để những đã này khi đến về như từ ra tôi anh cũng ở lại vào "
    "nhiều thì nhưng phải nó sẽ còn rất làm đó trên sau theo bị",
}  # fmt: skip
_WEIGHTS: dict[str, list[tuple[str, float]]] = {}
_OWNERS = Counter(word for said in _COMMON.values() for word in set(said.split()))
for _code, _said in _COMMON.items():
    for _word in set(_said.split()):
        _WEIGHTS.setdefault(_word, []).append((_code, 1 / _OWNERS[_word]))

_SCRIPTS: Mapping[str, str] = {
    "Latin": "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff",
    "Cyrillic": "\u0400-\u052f",
    "Greek": "\u0370-\u03ff\u1f00-\u1fff",
    "Arabic": "\u0620-\u06ff\u0750-\u077f",
    "Hebrew": "\u05d0-\u05ea",
    "Devanagari": "\u0900-\u097f",
    "Bengali": "\u0980-\u09ff",
    "Tamil": "\u0b80-\u0bff",
    "Telugu": "\u0c00-\u0c7f",
    "Thai": "\u0e00-\u0e7f",
    "Georgian": "\u10a0-\u10ff",
    "Armenian": "\u0530-\u058f",
    "Hangul": "\uac00-\ud7a3\u1100-\u11ff",
    "Kana": "\u3040-\u30ff",
    "Han": "\u3400-\u9fff",
}
_LETTERS = {script: re.compile(f"[{letters}]") for script, letters in _SCRIPTS.items()}
_OF_SCRIPT = {
    "Greek": "el", "Hebrew": "he", "Devanagari": "hi", "Bengali": "bn", "Tamil": "ta", "Telugu": "te", "Thai": "th",
    "Georgian": "ka", "Armenian": "hy", "Hangul": "ko", "Kana": "ja", "Han": "zh", "Cyrillic": "ru", "Arabic": "ar",
}  # fmt: skip
_TELLING = {
    "Cyrillic": [("uk", re.compile("[іїєґІЇЄҐ]")), ("ru", re.compile("[ыэъёЫЭЪЁ]"))],
    "Arabic": [("ur", re.compile("[ٹڈڑںے]")), ("fa", re.compile("[پچژگ]"))],
}

LANGUAGES = (*_COMMON, *dict.fromkeys([*_OF_SCRIPT.values(), "uk", "ur", "fa"]))
"""Tags that `language` gives, besides `und`."""


@dataclass(frozen=True, slots=True)
class Tag:
    """A language (ISO 639-1, or `und`) and, from 0 to 1, the share of the evidence that is for it."""

    code: str
    share: float


def language(text: str) -> Tag:
    """The language of `text`; the same text always has the same tag."""
    if len(text) > LOOKED_AT:
        middle = (len(text) - LOOKED_AT) // 2
        text = text[middle : middle + LOOKED_AT]
    counts = {script: len(pattern.findall(text)) for script, pattern in _LETTERS.items()}
    total = sum(counts.values())
    if total == 0:
        return Tag(UNDETERMINED, 0.0)
    if counts["Kana"] and counts["Kana"] + counts["Han"] > total / 2:  # Japanese mixes both; Chinese has no kana
        of_both = counts["Kana"] / (counts["Kana"] + counts["Han"])
        return Tag("ja" if of_both > 0.05 else "zh", (counts["Kana"] + counts["Han"]) / total)
    script = max(counts, key=lambda name: counts[name])
    share = counts[script] / total
    if script == "Latin":
        return _latin(text)
    code = _OF_SCRIPT[script]
    for other, letters in _TELLING.get(script, ()):
        if len(letters.findall(text)) > 0.01 * counts[script]:
            code = other
            break
    return Tag(code, share) if share > 0.5 else Tag(UNDETERMINED, share)


def _latin(text: str) -> Tag:
    found = words(text)
    scores: Counter[str] = Counter()
    for word in found:
        for code, weight in _WEIGHTS.get(word, ()):
            scores[code] += weight  # type: ignore[assignment]  # a Counter adds fractions as well
    ranked = [*scores.most_common(2), ("", 0.0), ("", 0.0)]
    (code, most), (_, next_most) = ranked[:2]
    sure = most / max(sum(scores.values()), 1e-9)
    if not found or most < ENOUGH * len(found) or most < AHEAD * next_most:
        return Tag(UNDETERMINED, sure)
    return Tag(code, sure)
