import os

import pytest

from visprompt.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Größe, 猫 [v2] 'a' \"b\" 50%", "Größe, 猫 [v2] 'a' \"b\" 50%"),
        (os.fsdecode(b"caf\xe9.png"), r"caf\xe9.png"),
        ("caf\\xe9.png", r"caf\\xe9.png"),
        ("a\x1b[31m\nb\0\x7f\x9b", r"a\x1b[31m\x0ab\x00\x7f\x9b"),
        ("abc\u202egnp.exe", r"abc\u202egnp.exe"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_cannot_be_shown_is_escaped(text, shown):
    assert printable(text) == shown
    shown.encode()
