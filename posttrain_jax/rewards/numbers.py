"""The last number of a text, as people, models and LaTeX write numbers, read exactly.

What counts as one number:

- Digits of any script, with a decimal point: 42, 0.5, .5, and "42." at the end of a sentence.
- Thousands in groups of three after commas (1,234.5), spaces (1 234), apostrophes or underscores, or as in India
  (12,34,567); after points only where nothing else can be meant: 1.234.567 and 1.234,5. So "1.234" has a decimal point,
  and "1,2" and "7, 8" are lists, of which the last number is read.
- A minus, in any of its characters (U+2212, en dash, full width), also before a currency: -$5. The one of "10-5" and of
  the bullet "- 5" is none, that of "= - 5" is. "negative 5" is -5.
- Powers of ten and of other numbers: 1e5, 1.5E-3, 1.5 x 10^3, 10^{-3}, 10⁵, 2**10.
- Fractions: 3/4, 1 1/2, 5½, \\frac{3}{4}, 2\\frac12.
- Currency and percent signs are units like others: $5 and 5% are 5. An exponent or index of a letter or unit is no
  number: "25 cm^2" is 25.

What holds digits and cannot be read as a number (3:30, 3/4/2020, 1/0, 2π, \\sqrt{2}, 1e99999) gives None, as a text
without digits does. Sums and products are not worked out; words (three, million) are not read.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

Number = Decimal | Fraction
"""A Decimal wherever finitely many decimals write the number, so that equal numbers compare as equal."""

_MOST_DIGITS = 1000  # of a number, written out
_FORMULA = "\ufffc"  # stands for what is a number and is not read
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63", "-"),
        **dict.fromkeys("\u2044\u2215", "/"),
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full width
        "\u066b": ".",
        "\u066c": ",",
    }
)

_BY_POINTS = r"(?:\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}(?![.\d]))"
_DIGITS = (
    r"(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)(?:\.\d+)?"
    r"|\d{1,2}(?:,\d\d)+,\d{3}(?!\d|,\d)(?:\.\d+)?"
    r"|\d{1,3}(?:[ \u00a0]\d{3})+(?!\d|[ \u00a0]\d)(?:[.,]\d+)?"
    r"|\d{1,3}(?:['’]\d{3})+(?!\d)(?:\.\d+)?"
    r"|\d+(?:_\d+)+(?:\.\d+)?"
    rf"|{_BY_POINTS}|\d+(?:\.\d+)?|(?<!\.)\.\d+)"
)
_SIGN = (
    r"(?:(?<![\w.)\]}%°-])-(?=(?:[$€£¥]\s?)?\.?\d)"
    r"|(?:(?<=[=≈(])\s?-\s|\b[Nn]egative\s)(?=[$€£¥]?\.?\d))"
)
_NUMBER = re.compile(
    rf"(?P<minus>{_SIGN})?(?:[$€£¥]\s?)?"
    # Not in the middle of a number, and not an exponent, index or denominator of what stands before.
    r"(?<!\d)(?<!\d\.)(?<![A-Za-z\d)\]}][/^_])(?<![A-Za-z\d)\]}]\^[-(])(?<![A-Za-z\d)\]}]\^\(-)"
    rf"(?:(?P<unread>{_FORMULA}(?:\s?[/*^]?\s?{_DIGITS})?|\d+(?::\d+)+|\d+(?:/\d+){{2,}}"
    rf"|(?!{_BY_POINTS})\d+(?:\.\d+){{2,}})"
    rf"|(?P<whole>{_DIGITS})[ \u00a0]{{1,2}}(?P<part>\d+)/(?P<parts>\d+)"
    rf"|(?P<over>{_DIGITS}) ?/ ?(?P<under>-?{_DIGITS})"
    rf"|(?P<digits>{_DIGITS})"
    r"(?:[eE](?P<e>[-+]?\d+)|\s?[*x]\s?10(?:\s?\^\s?|\*\*)\(?(?P<ten>[-+]?\d+)\)?"
    r"|(?:\s?\^\s?|\*\*)\(?(?P<power>[-+]?\d+)\)?)?)"
)
_GOES_ON = re.compile(rf"[)\s]*(?:\^|\*\*\d|/\s?\d|{_FORMULA})")  # "(1/2)^2", "2 π"
_VULGAR = re.compile("(\\d?)([\u00bc-\u00be\u2150-\u215e])")
_MIXED = re.compile(r"(?<![\w.,/])(\d{1,9}) {1,2}(\d{1,9})/(\d{1,9})(?![\w./])")
_E_NOTATION = re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d{1,3})(?![\w.]*\d)")


def last_number(text: str) -> Number | None:
    """The number that a text ends with, by the rule above: the last one in its last `\\boxed{...}`, if it has a box."""
    text = _without_latex(plain_characters(_boxed(text)))
    last = next(reversed(list(_NUMBER.finditer(text))), None)
    if last is None or _GOES_ON.match(text, last.end()):
        return None
    return _value(last)


def plain_characters(text: str) -> str:
    """The text with digits, minus signs, fractions (½) and full-width characters in ASCII."""
    if text.isascii():
        return text
    text = "".join(map(_ascii_digit, text.translate(_CHARACTERS)))
    return _VULGAR.sub(
        lambda match: match[1] + " " * bool(match[1]) + unicodedata.normalize("NFKD", match[2]), text
    ).translate(_CHARACTERS)


def plain_numbers(text: str) -> str:
    """The text with `plain_characters`, 1.5e-3 as 0.0015 and 1 1/2 as 3/2, for math-verify, which reads 1.5 and 1."""
    text = _E_NOTATION.sub(lambda match: f"{Decimal(match[0]):f}", plain_characters(text))
    return _MIXED.sub(lambda match: f"{int(match[1]) * int(match[3]) + int(match[2])}/{match[3]}", text)


def _ascii_digit(character: str) -> str:
    return str(unicodedata.decimal(character)) if character.isdecimal() else character


def _boxed(text: str) -> str:
    """What stands in the last `\\boxed{...}`; all of a text without one; nothing of a box that is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return text
    start += len("\\boxed{")
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return ""


def _without_latex(text: str) -> str:
    """Numbers in LaTeX and with typographic signs as plain text; what is not read as one is _FORMULA."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda match: f"^({match[0].translate(_SUPERSCRIPTS)})", text)
    text = re.sub(r"[×·⋅]|\\times(?![A-Za-z])|\\cdot(?![A-Za-z])", "*", text)
    text = text.replace("{,}", ",").replace("\\!", "")
    text = re.sub(r"\\[,;: ]|[\u2007\u2009\u202f]", "\u00a0", text)
    text = re.sub(r"\\(?=[$%#&])|\\left(?![A-Za-z])|\\right(?![A-Za-z])", "", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))", "°", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^\s*\{([^{}]*)\}", r"^(\1)", text)
    part = r"(?:\{\s*(-?[\d.,]+)\s*\}|\s*(\d))"
    text = re.sub(
        rf"(\d?)\s{{0,2}}\\[dtc]?frac\s*{part}\s*{part}",
        lambda match: f"{match[1]}{' ' if match[1] else ''}{match[2] or match[3]}/{match[4] or match[5]} ",
        text,
    )
    for _ in range(8):  # from the inside
        text, count = re.subn(
            r"\\sqrt\s*(?:\[[^\[\]]*\])?\s*\{[^{}]*\}|\\[dtc]?frac\s*\{[^{}]*\}\s*\{[^{}]*\}", _FORMULA, text
        )
        if not count:
            break
    return re.sub(r"√|π|∞|\\(?:sqrt|pi|infty|[dtc]?frac)(?![A-Za-z])", _FORMULA, text)


def _value(match: re.Match[str]) -> Number | None:
    """A match of _NUMBER as a number; None for one that is none, or that has too many digits."""
    if match["unread"] or len(match[0]) > _MOST_DIGITS:
        return None
    if match["whole"]:
        whole, part, parts = _decimal(match["whole"]), _decimal(match["part"]), _decimal(match["parts"])
        if not part < parts:
            return None
        value = Fraction(whole) + Fraction(part) / Fraction(parts)
    elif match["over"]:
        over, under = Fraction(_decimal(match["over"])), Fraction(_decimal(match["under"]))
        if not under:
            return None
        value = over / under
    else:
        value = Fraction(_decimal(match["digits"]))
        exponent = int(match["e"] or match["ten"] or match["power"] or 0)
        base = value if match["power"] else Fraction(10)
        if abs(exponent) * len(str(max(base.numerator, base.denominator))) > _MOST_DIGITS:
            return None
        if match["power"]:
            if not value and exponent < 0:
                return None
            value = value**exponent
        else:
            value *= base**exponent
    return _decimal_or_fraction(-value if match["minus"] else value)


def _decimal(digits: str) -> Decimal:
    """Digits of one of the forms of _DIGITS, perhaps with a minus."""
    if re.fullmatch(f"-?{_BY_POINTS}", digits):
        digits = digits.replace(".", "").replace(",", ".")
    elif re.search(r"[ \u00a0]", digits):
        digits = digits.replace(",", ".")
    return Decimal(re.sub(r"[^-\d.]", "", digits))


def _decimal_or_fraction(value: Fraction) -> Number:
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return value
    places = max(twos, fives)
    return Decimal(f"{value.numerator * 10**places // value.denominator}E-{places}")
