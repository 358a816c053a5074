"""Personal data goes, other numbers stay."""

import pytest

from encoders.lm.personal_data import iban_is_right, luhn_is_right, scrub


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("write to anna.smith+shop@mail.example.co.uk today", "write to [email] today"),
        ("call +44 20 7946 0958 now", "call [phone] now"),
        ("call 0049 (0)30 901820.", "call [phone]."),
        ("call (555) 123-4567", "call [phone]"),
        ("call 030 901 8200", "call [phone]"),
        ("IBAN DE89 3704 0044 0532 0130 00, thanks", "IBAN [iban], thanks"),
        ("iban GB29NWBK60161331926819", "iban [iban]"),
        ("paid with 4111 1111 1111 1111", "paid with [card]"),
        ("from 192.168.10.254 and 2001:db8::8a2e:370:7334", "from [ip] and [ip]"),
        ("from fe80::1c2:3 to 2a00::8b", "from [ip] to [ip]"),
        # Check digits that are wrong, versions, times, prices and codes stay.
        ("order 4111 1111 1111 1112", "order 4111 1111 1111 1112"),
        ("IBAN DE88 3704 0044 0532 0130 00", "IBAN DE88 3704 0044 0532 0130 00"),
        ("version 999.1.2.3, 12:30, 22.95, 85123A", "version 999.1.2.3, 12:30, 22.95, 85123A"),
        ("set of 6 t-lights 22086, 1000 pieces", "set of 6 t-lights 22086, 1000 pieces"),
        ("std::vector of 10 x 20 cm", "std::vector of 10 x 20 cm"),
        ("a :: b, rows[::2], add::feed, ::1", "a :: b, rows[::2], add::feed, ::1"),
    ],
)
def test_what_is_replaced(text: str, scrubbed: str) -> None:
    assert scrub(text)[0] == scrubbed


def test_places_are_counted() -> None:
    text, counts = scrub("a@b.de, c@d.de, 10.0.0.1")
    assert text == "[email], [email], [ip]"
    assert counts == {"email": 2, "ip": 1}


def test_check_digits() -> None:
    assert luhn_is_right("79927398713")  # the example of the standard
    assert not any(luhn_is_right(f"7992739871{digit}") for digit in (0, 1, 2, 4, 5, 6, 7, 8, 9))
    assert iban_is_right("GB82WEST12345698765432")
    assert not iban_is_right("GB83WEST12345698765432")
