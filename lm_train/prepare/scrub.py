"""What says who someone is, replaced by a placeholder: e-mail addresses, phone and card numbers, IP addresses.

By form alone: a number that merely looks like one goes too (`1.2.3.4` may be a version), and one in an unusual form stays.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

_EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9_][\w.+%-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w-])"
)
_CARD = re.compile(
    r"(?<![\w.,-])(?:\d{4}[ -]\d{4}[ -]\d{4}[ -]\d{1,7}|\d{4}[ -]\d{6}[ -]\d{4,5}|\d{13,19})(?![\w-]|[.,]\d)"
)
_PHONE = re.compile(
    r"(?<![\w+])(?:\+|00(?=[1-9]))[1-9]\d{0,2}(?:[ .()/-]{0,2}\d{1,5}){2,6}(?!\d)"  # international
    r"|(?<![\w.+-])(?:1[ .-]?)?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[ .-])[2-9]\d{2}[ .-]\d{4}(?![\w-])"  # North America
    r"|(?<![\w.+/-])\(?0[1-9]\d{1,4}\)?[ /-]\d{3,8}(?:[ -]\d{2,5}){0,2}(?![\w/-])"  # national, with its leading zero
)
_BYTE = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_IPV4 = re.compile(rf"(?<![\w.])(?:{_BYTE}\.){{3}}{_BYTE}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f:]*\d)[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")


def scrub_emails(text: str) -> tuple[str, int]:
    """The text without e-mail addresses, and how many characters they had.

    >>> scrub_emails("write to jane.doe+x@mail.example.org.")
    ('write to <EMAIL>.', 27)
    """
    return _replaced(text, _EMAIL, "<EMAIL>", lambda found: True) if "@" in text else (text, 0)


def scrub_cards(text: str) -> tuple[str, int]:
    """The text without card numbers: 13 to 19 digits in a card's groups, with a right check digit (ISO/IEC 7812, Luhn).

    >>> scrub_cards("paid with 4111 1111 1111 1111, not 4111 1111 1111 1112")
    ('paid with <CARD>, not 4111 1111 1111 1112', 19)
    """
    return _replaced(text, _CARD, "<CARD>", _is_card)


def scrub_phones(text: str) -> tuple[str, int]:
    """The text without phone numbers: with a country code, in North American groups, or with area code and leading zero.

    >>> scrub_phones("call +49 30 901820 or (415) 555-2671 on 2024-05-06")
    ('call <PHONE> or <PHONE> on 2024-05-06', 27)
    """
    return _replaced(text, _PHONE, "<PHONE>", _is_phone)


def scrub_ips(text: str) -> tuple[str, int]:
    """The text without IP addresses, of either version, but for those that mean no machine or the own one.

    >>> scrub_ips("from 203.0.113.9 and 2001:db8::1 to 127.0.0.1")
    ('from <IP> and <IP> to 127.0.0.1', 22)
    """
    text, first = _replaced(text, _IPV4, "<IP>", _is_address)
    text, second = _replaced(text, _IPV6, "<IP>", _is_address)
    return text, first + second


SCRUBBERS: dict[str, Callable[[str], tuple[str, int]]] = {
    "emails": scrub_emails,
    "cards": scrub_cards,
    "phones": scrub_phones,
    "ips": scrub_ips,
}
"""By the rule's name, in the order that keeps them out of each other's way."""


def scrub_all(text: str) -> str:
    """The text after every scrubber, as an example may be shown."""
    for scrub in SCRUBBERS.values():
        text = scrub(text)[0]
    return text


def _replaced(text: str, pattern: re.Pattern[str], by: str, real: Callable[[str], bool]) -> tuple[str, int]:
    removed = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal removed
        if not real(match[0]):
            return match[0]
        removed += len(match[0])
        return by

    return pattern.sub(replace, text), removed


def _is_card(text: str) -> bool:
    digits = [int(c) for c in text if c.isdecimal()]
    if not 13 <= len(digits) <= 19 or not 2 <= digits[0] <= 6:
        return False
    doubled = (d * 2 - 9 * (d > 4) for d in digits[-2::-2])
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_phone(text: str) -> bool:
    digits = sum(c.isdecimal() for c in text)
    return (8 if text[0] == "+" or text.startswith("00") else 9) <= digits <= 15


def _is_address(text: str) -> bool:
    if ":" in text and sum(c.isalnum() for c in text) < 4:  # a::b is a name in many languages of programming
        return False
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified)
