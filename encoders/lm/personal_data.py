"""Replaces personal data in text: what has a form of its own, not names and addresses.

Numbers with check digits (cards, IBANs) are replaced only where these are right, so that order
numbers stay.
"""

import re
from collections import Counter
from collections.abc import Callable
from ipaddress import ip_address

_CARD_DIGITS = range(13, 20)
"""ISO/IEC 7812: shortest and longest card numbers in use."""
_IBAN_LETTERS = range(15, 35)
"""ISO 13616: Norway's has 15, the longest allowed has 34."""


def luhn_is_right(digits: str) -> bool:
    """Whether the last digit is the check digit of those before (ISO/IEC 7812, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def iban_is_right(iban: str) -> bool:
    """Whether the check digits are right (ISO 7064, modulo 97-10)."""
    turned = iban[4:] + iban[:4]
    return int("".join(str(int(character, 36)) for character in turned)) % 97 == 1


def _is_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return len(digits) in _CARD_DIGITS and luhn_is_right(digits)


def _is_iban(text: str) -> bool:
    letters = re.sub(r"\s", "", text).upper()
    return len(letters) in _IBAN_LETTERS and iban_is_right(letters)


def _is_address(text: str) -> bool:
    try:
        address = ip_address(text)
    except ValueError:
        return False
    # Of version 6 most is nobody's: a double colon alone, a slice such as ::2, words beside one.
    return address.version == 4 or not address.is_reserved


def _always(_text: str) -> bool:
    return True


_KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("email", re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", re.ASCII), _always),
    ("iban", re.compile(r"\b[A-Za-z]{2}\d{2}(?: ?[A-Za-z0-9]{1,4}){3,8}\b", re.ASCII), _is_iban),
    ("card", re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?![\w])", re.ASCII), _is_card),
    ("ip", re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f:]{2,39})(?![\w:])"),
     _is_address),
    # International, or national with an area code; not the end of a longer number.
    (
        "phone",
        re.compile(
            r"(?<![\w.+])(?<!\d )(?:(?:\+|00)[1-9]\d{0,2}[ ./()-]{0,2}(?:\d[ ./()-]{0,2}){6,11}\d"
            r"|\(?0\d{2,4}\)?[ ./-]{1,2}\d{3,4}[ .-]?\d{3,4}"
            r"|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4})(?![\w])",
            re.ASCII,
        ),
        _always,
    ),
)  # fmt: skip


def scrub(text: str) -> tuple[str, Counter[str]]:
    """Replace e-mail addresses, IBANs, card numbers, IP addresses and telephone numbers.

    Returns:
        The text with ``[email]``, ``[iban]``, ``[card]``, ``[ip]``, ``[phone]`` in their places,
        and how often each was.
    """
    counts: Counter[str] = Counter()
    for kind, pattern, is_one in _KINDS:

        def replaced(
            match: re.Match[str], kind: str = kind, is_one: Callable[[str], bool] = is_one
        ) -> str:
            if not is_one(match.group()):
                return match.group()
            counts[kind] += 1
            return f"[{kind}]"

        text = pattern.sub(replaced, text)
    return text, counts
