"""Texts that break tokenizers: written by hand, and generated from a seed."""

from __future__ import annotations

import random

MULTILINGUAL = [
    "The quick brown fox jumps over the lazy dog.",
    "Größe, Maß und Übermut: »schön« – sagte sie…",
    "L’été, à Noël, où l'on s'ennuie; cœur, œuvre, naïveté.",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia. ¿Verdad? ¡Sí!",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "いろはにほへと ちりぬるを、我が世誰ぞ常ならむ。カタカナ ｶﾀｶﾅ",
    "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "นายสังฆภัณฑ์ เฮงพิทักษ์ฝั่ง ผู้เฒ่าซึ่งมีอาชีพเป็นฅนขายฃวด",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश",
    "صِف خَلقَ خَودِ كَمِثلِ الشَمسِ إِذ بَزَغَت",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "Հայաստան Հանրապետություն ა ბ გ დ ე ჴ",
    "Iñtërnâtiônàlizætiøn Ĳĳǅǆŉΐﬀﬁ ẞß İıſ K Å",
    "ᚠᛇᚻ᛫ᛒᛦᚦ᛫ᚠᚱᚩᚠᚢᚱ 𐌰𐌱𐌲 𝕬𝖇𝖈 𝟘𝟙𝟚𝟛 ①②③ ⅣⅤ ½⅓ ٠١٢٣ १२३ 〇一二三",
]

CODE = [
    "def f(x):\n    return x\n\n",
    "if (a && b || !c) { x->y = *p++; } // done\n/* block */\n#define N 0x1F\n",
    "\tfor (int i = 0; i < n; ++i)\r\n\t\tsum += a[i];\r\n",
    "SELECT * FROM t WHERE a='b' AND c<>\"d\"; -- x",
    '<html><body class="x">&nbsp;&amp;</body></html>',
    '{"a": [1, 2.5e-10, null, true], "b": {"c": "\\u00e9\\n"}}',
    "print(f'{x!r:>{w}}')  # it's  we'll  I'd  they've  you're  I'm  can't  CAN'T  don’t",
    "x = lambda *a, **k: [i for i in range(10**6) if i % 3 == 0 and i & 1]",
    "https://example.com/a/b/?q=1&r=%20#frag user@example.org C:\\Users\\x\\y.txt /usr/bin/env",
    "$$\\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$$",
    "1234567890 12 345 6789 3.14159 1,000,000 0b1010 1e5 ２３４５",
    "a_b-c.d:e;f,g!h?i(j)k[l]m{n}o<p>q|r\\s/t~u`v@w#x$y%z^&*+=",
]

WHITESPACE = [
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\r",
    "\r\n",
    "\r\n\r\n",
    "\t",
    "\t\t\t",
    " \n",
    "\n ",
    " \n ",
    "  \n  \n  ",
    "\t \t \n\t",
    " a",
    "a ",
    "  a  b   c    d     ",
    "a\u00a0b\u00a0\u00a0c",
    "a\u2003b\u3000c\u2028d\u2029e\u0085f",
    "\u200b\u200c\u200d\ufeff",
    "\x0b\x0c\x1c\x1d\x1e\x1f\x00\x01\x7f",
    "\x1c\x1c\x1c x \x1f\x1f",
    "a\u180eb\u1680c\u205fd\u202fe",
    "▁",
    "▁▁ ▁a ▁",
    *(" " * n for n in (4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 255)),
    *(" " * n + "x" for n in (2, 3, 15, 16, 17, 33, 83, 128)),
    *("\n" * n + "y" for n in (4, 5, 16, 17)),
    *("\t" * n + "z" for n in (4, 9, 40)),
]

EMOJI = [
    "🙂",
    "🙂🙃😀😁😂🤣",
    "👍🏽👩🏿‍🚀",
    "👨‍👩‍👧‍👦👨‍👩‍👧‍👦",
    "🏳️‍🌈🏴‍☠️🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "🇫🇷🇩🇪🇯🇵🇺",
    "1️⃣2️⃣#️⃣*️⃣",
    "☺☺️☹♥️♥",
    "e\u0301e\u0300\u0301\u0302 a\u0323\u0307",
    "Z̸̢̛͔a̶l̵g̷o̴ ̶t̵e̷x̴t̸",
    "\u202eright to left\u202c \u2066isolate\u2069",
    "\ud7a3\ue000\ufffd\ufffe\uffff\U0001fffe\U0010ffff",
]

NAUGHTY = [
    "undefined", "null", "NULL", "None", "NaN", "-Infinity", "true", "0", "-0", "1/0", "0x0", "1e309", "0.0000001",
    "<script>alert('x')</script>", "'; DROP TABLE users; --", "\" OR 1=1", "../../../../etc/passwd", "$(touch x)",
    "${jndi:ldap://x}", "{{7*7}}", "%s%n%x%d", "%00", "\\x00\\u0000", "--help", "-", "--", "|", "&&", "CON", "PRN",
    "<unk>", "<s>", "</s>", "<pad>", "<mask>", "<0x0A>", "<0x00><0xFF>", "<0xe2>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>",
    "▁<PRE>", " <PRE> x <SUF> y <MID> z <EOT>", "<step>", "<FILL_ME>", "<|im_start|>", "<|endoftext|>",
    "<|begin_of_text|>", "<|start_header_id|>system<|end_header_id|>\n\nx<|eot_id|>", "<|python_tag|>", "<|image|>",
    "<|header_start|>user<|header_end|>", "<|eot|>", "<|eom|>", "<|reserved_special_token_0|>", "<| eot_id |>",
    "<|eot_id|", "|eot_id|>", "<|eot_id|>>", "<<|eot_id|>", "<|<|eot_id|>|>", "<|eot_id|><|eot_id|>", "<|EOT_ID|>",
    "ﬁ ﬂ ﬀ ﬃ", "İstanbul ıİiI", "ǅ ǈ ǋ", "ß ẞ SS", "'ſ it'ſ 'S 'ſtory", "K’s k's", "Ω≈ç√∫˜µ≤≥÷", "åß∂ƒ©˙∆˚¬…æ", "⁰⁴⁵₀₁₂",
    "ด้้้้้็็็็็้้้้้็็็็็", "﷽﷽", "(╯°□°）╯︵ ┻━┻)", "¯\\_(ツ)_/¯", "˙ɐnbᴉlɐ", "Ｔｈｅ ｑｕｉｃｋ", "𝐓𝐡𝐞 𝓺𝓾𝓲𝓬𝓴", "⒯⒣⒠",
    "田中さんにあげて下さい", "和製漢語", "사회과학원", "𠜎𠜱𠝹𠱓", "表ポあA鷗ŒéＢ逍Üßªąñ丂㐀𠀀", "Ⱥ Ⱦ", "ⰀⰁ",
    "\u0e33\u0eb3", "a\u0000b",
    "a" * 300, "Ab" * 200, "0" * 200, "-" * 200, "=" * 130, "ha" * 150, "é" * 99, "漢" * 99, "🙂" * 40, "'s" * 50, "!?" * 77,
    "the the  the   the\tthe\nthe\r\nthe", "MiXeD CaSe wOrDs HTTPServer XMLHttpRequest iPhone eBay McDonald's O'Neill's",
]  # fmt: skip

ALL = [*MULTILINGUAL, *CODE, *WHITESPACE, *EMOJI, *NAUGHTY]

_ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",
    "0123456789",
    " \n\t\r",
    " ",
    "'\"!?.,;:-_/\\()[]{}<>|@#$%^&*+=~`",
    "'sStTmMdDlLrReEvV ſ",
    "äöüßéèêçñåøœæ",
    "абвгдежзийклмнопрстуфхцчшщъыьэюя",
    "的一是不了人我在有他这为之大来以个中上们",
    "のにはをたがでてとしれさあるいうおか",
    "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "अआइईउऊकखगघचछजझटठडढणतथदधनपफबभमयरलवशषसह\u093e\u093f\u0940\u094d",
    "🙂😀👍🏽👩\u200d🚀🇫🇷❤\ufe0f",
    "▁\u00a0\u2003\u3000\u200b\u2028\u0085\x00\x1c\x1f",
    "<|>eot_idbegin_of_texthsr/SYSINT[]",
]
_PROSE = """
the of and to in is that it was for on are with as his they at be this from I have or by one had not but what all were when we
there can an your which their said if do will each about how up out them then she many some so these would don't I'm we've it's
THE And They'll function return import class static void int float string const let var
"""
_WORDS = _PROSE.split()


def generate(count: int, seed: int) -> list[str]:
    """`count` short texts: runs of one alphabet, mixtures, words with odd spacing, and any characters at all."""
    rng = random.Random(seed)
    return [_one(rng) for _ in range(count)]


def _one(rng: random.Random) -> str:
    kind = rng.randrange(5)
    if kind == 0:
        return "".join(rng.choices(rng.choice(_ALPHABETS), k=rng.randrange(1, 40)))
    if kind == 1:
        runs = rng.randrange(1, 8)
        return "".join("".join(rng.choices(rng.choice(_ALPHABETS), k=rng.randrange(1, 8))) for _ in range(runs))
    if kind == 2:
        spaces = [" ", " ", " ", "  ", "\n", "\n\n", "\t", ", ", ". ", "-", ""]
        return "".join(rng.choice(_WORDS) + rng.choice(spaces) for _ in range(rng.randrange(1, 15)))
    if kind == 3:
        return rng.choice(ALL)[: rng.randrange(1, 60)] + rng.choice(ALL)[: rng.randrange(1, 30)]
    return "".join(chr(_scalar(rng)) for _ in range(rng.randrange(1, 20)))


def _scalar(rng: random.Random) -> int:
    """Any Unicode scalar value (no surrogate), small ones more often."""
    point = rng.randrange((0x80, 0x800, 0x10000, 0x110000)[rng.randrange(4)])
    return point if not 0xD800 <= point < 0xE000 else 0x1F600
