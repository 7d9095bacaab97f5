"""Numbers of data files as the text that an answer is: whole, or in plain decimals, to the last digit.

`1e-05` would be e - 5 to math-verify, `42.0` not `42` to an exact or regex reward, and a float64 of
123456789012345678 another number: its author's text is kept, written out, or refused.
"""

import math
import sys
from decimal import Decimal, InvalidOperation

_MOST_DIGITS = sys.int_info.default_max_str_digits  # more than these, Python's own int() refuses
_FLOATS = {64: ("float64", 2**53), 32: ("float32", 2**24), 16: ("float16", 2**11)}


class Number(str):
    """A number as it stands in a JSON file: no digit of it is lost, and none is added."""

    __slots__ = ()


def as_text(value: object, bits: int = 64) -> str:
    """A text as it is, a number written out. bits: of the column that a float comes from.

    Raises ValueError, saying what the value is, for all else.
    """
    if isinstance(value, Number):
        return _plain(_decimal(value), value)
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        raise ValueError(f"is {str(value).lower()}, not a text or a number: write the word as text")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _of_float(value, bits)
    if isinstance(value, Decimal):
        # Its column's type writes 0.50 for 0.5.
        text = _plain(value, str(value))
        return text.rstrip("0") if "." in text else text
    if isinstance(value, bytes):
        raise ValueError("is binary, not a text or a number: store it as text (string)")
    said = str(value)[:100]
    raise ValueError(
        f"is {said} ({type(value).__name__}), not a text or a number; the column's name may lead into "
        "nested ones, e.g. reward_model.ground_truth"
    )


def _of_float(value: float, bits: int) -> str:
    name, exact = _FLOATS[bits]
    if not math.isfinite(value):
        raise ValueError(f"is {value}, not a number: perhaps it is missing; leave the row out")
    if value.is_integer() and abs(value) > exact:
        raise ValueError(
            f"is {value:.0f}, a whole number in a {name} column, which is exact to {exact} only and may "
            "have lost digits: write it as text, or as an integer"
        )
    if bits != 64:
        import numpy

        value = getattr(numpy, name)(value)  # 0.1, not 0.10000000149011612
    return _plain(Decimal(str(value)), str(value))


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:  # of the exponent
        raise ValueError(_too_long(text)) from None


def _plain(number: Decimal, said: str) -> str:
    """Without an exponent; a whole number without a point. said: the number as it was found."""
    if not number.is_finite():
        raise ValueError(f"is {said}, not a number: perhaps it is missing; leave the row out")
    if number and max(abs(number.adjusted()), len(number.as_tuple().digits)) >= _MOST_DIGITS:
        raise ValueError(_too_long(said))
    whole, _, decimals = format(number if number else Decimal(0), "f").partition(".")
    return f"{whole}.{decimals}" if decimals.strip("0") else whole


def _too_long(text: str) -> str:
    short = text if len(text) < 40 else f"{text[:20]}...{text[-8:]}"
    return f"is {short}, a number of over {_MOST_DIGITS} digits, which nothing here can compare"
