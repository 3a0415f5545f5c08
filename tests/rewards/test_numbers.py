"""How numbers are read: the table of `rewards/numbers.py`, each value by hand."""

from __future__ import annotations

import time
from decimal import Decimal
from fractions import Fraction

import pytest

from posttrain_jax.rewards.numbers import last_number, plain_numbers

TABLE = {
    "digits": [
        ("It is 42.", "42"),
        ("0.5", "0.5"),
        ("it is -.5", "-0.5"),
        ("00,123", "123"),
        ("４２", "42"),
        ("１，２３４．５", "1234.5"),
        ("٤٢", "42"),
        ("٣٫٥", "3.5"),
        ("9" * 999, "9" * 999),
    ],
    "thousands": [
        ("1,234.50 dollars", "1234.50"),
        ("5,000", "5000"),
        ("1,234, which is much", "1234"),
        ("12,34,567", "1234567"),
        ("1 234", "1234"),
        ("1 234 567.5", "1234567.5"),
        ("1\u202f234,5", "1234.5"),
        ("1'234", "1234"),
        ("1_000", "1000"),
        ("1.234.567", "1234567"),
        ("1.234,56", "1234.56"),
        ("1.234", "1.234"),
        ("1{,}234", "1234"),
        (r"1\,234", "1234"),
    ],
    "lists": [("1,2", "2"), ("1,2,3", "3"), ("7, 8", "8"), ("1,234,5", "5"), ("1 234 5", "5"), ("0,5", "5")],
    "signs": [
        ("x = \u22123", "-3"),
        ("－5", "-5"),
        ("–5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        (r"-\$5", "-5"),
        ("(-5)", "-5"),
        ('"-5"', "-5"),
        ("10 + -5", "-5"),
        ("x = - 5", "-5"),
        ("x = \u2212 5", "-5"),
        ("negative 5", "-5"),
        ("10-5", "5"),
        ("10 - 5", "5"),
        ("10\u22125", "5"),
        ("3–5", "5"),
        ("(3)-2", "2"),
        ("50%-5", "5"),
        ("20°-30°", "30"),
        ("Answer:\n- 5", "5"),
        ("that is--5", "5"),
    ],
    "powers": [
        ("1e5", "100000"),
        ("1.5e-3", "0.0015"),
        ("1.5E+3", "1500"),
        ("1.5 x 10^3", "1500"),
        (r"1.5 \times 10^{-3}", "0.0015"),
        ("1.5 × 10³", "1500"),
        ("10^5", "100000"),
        ("10⁻²", "0.01"),
        ("2^10", "1024"),
        ("2**10", "1024"),
        ("**42** 7 apples", "7"),
        ("1e400", "1e400"),
    ],
    "fractions": [
        ("3/4", "0.75"),
        ("3/-4", "-0.75"),
        ("1/3", Fraction(1, 3)),
        ("-1/3", Fraction(-1, 3)),
        ("1 1/2", "1.5"),
        ("-2 1/2", "-2.5"),
        ("½", "0.5"),
        ("-½", "-0.5"),
        ("5½", "5.5"),
        ("5 ½ cups", "5.5"),
        (r"\frac{3}{4}", "0.75"),
        (r"$-\frac{3}{4}$", "-0.75"),
        (r"\frac{-3}{4}", "-0.75"),
        (r"2\frac{1}{2}", "2.5"),
        (r"\dfrac34", "0.75"),
        (r"\frac{1,000}{4}", "250"),
        ("48 / 2 = 24", "24"),
        ("1-1/2", "0.5"),
        ("2\n1/2", "0.5"),
    ],
    "units and marks": [
        ("$1,000.", "1000"),
        ("12%", "12"),
        (r"50\%", "50"),
        (r"\$5", "5"),
        ("25 cm^2", "25"),
        ("25 m²", "25"),
        (r"5\text{ cm}^2", "5"),
        ("9.8 m s^{-2}", "9.8"),
        ("9.8 m/s^2", "9.8"),
        (r"90^\circ", "90"),
        ("5 km/h", "5"),
        ("The answer is _5_.", "5"),
        ("**42**", "42"),
        ("5!", "5"),
    ],
    "boxes": [
        (r"\boxed{12}", "12"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{7}, as on page 12", "7"),
        (r"\boxed{x=-5}", "-5"),
        (r"\boxed{1} or \boxed{2}", "2"),
    ],
    "what cannot be read": [
        ("no digits", None),
        (r"\boxed{4", None),
        ("3:30", None),
        ("3/4/2020", None),
        ("5.6.2024", None),
        ("1/0", None),
        ("1 1/2/3", None),
        ("2π", None),
        ("π/4", None),
        (r"\sqrt{2}", None),
        (r"2\sqrt{3}", None),
        (r"\frac{\pi}{4}", None),
        (r"\frac{\sqrt{\frac{1}{2}}}{4}", None),
        ("x^2", None),
        ("x_1", None),
        ("(1/2)^2", None),
        ("2^3^2", None),
        ("1e99999", None),
        ("9" * 5000, None),
        (r"2\pi \approx 6.28", "6.28"),
    ],
}


@pytest.mark.parametrize("form", TABLE)
def test_the_last_number_of_a_text(form):
    wanted = {
        text: number if number is None or isinstance(number, Fraction) else Decimal(number)
        for text, number in TABLE[form]
    }
    assert {text: last_number(text) for text in wanted} == wanted


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("1.5e-3 m", "0.0015 m"),
        ("2E+3", "2000"),
        ("x1e5", "x1e5"),
        ("5½", "11/2"),
        ("1 1/2", "3/2"),
        ("−3", "-3"),
        ("$-½$", "$-1/2$"),
    ],
)
def test_what_math_verify_is_given(text, plain):
    assert plain_numbers(text) == plain


@pytest.mark.parametrize(
    "part", ["1 ", "1,", "1/", "9", "1.111", " ", "-$", "\\frac{", "\\boxed{", "\\sqrt[", "^{", "1'111"]
)
def test_a_long_text_takes_no_long_time(part):
    started = time.process_time()
    last_number(part * 20_000)
    assert time.process_time() - started < 5.0
