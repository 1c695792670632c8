"""Halves of characters."""

import pytest

from configs.text import has_half_character


@pytest.mark.parametrize(
    ("text", "is_half"),
    [
        ("", False),
        ("你好, 😀 \0", False),
        ("\ud7ff\ue000", False),
        ("a\ud800", True),
        ("\udfffb", True),
        ("\ud83d\ude00", True),  # two halves are not joined
        (b"\xc4\xe3".decode("utf-8", "surrogateescape"), True),
    ],
)
def test_halves_of_characters_are_seen(text, is_half):
    assert has_half_character(text) == is_half
