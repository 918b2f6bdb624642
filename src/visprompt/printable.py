"""Text of users and file systems in a form that every terminal, CSV and page can show."""

import re

_UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\\\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return a text with what cannot be shown escaped as in Python, so that it can be told what it was.

    Escaped are control characters, marks that reverse the direction of writing, bytes of file names that are no UTF-8
    (Python holds these as lone surrogates), and for the sake of the others the backslash: the file name of the bytes
    `caf\xe9` is shown as `caf\xe9`, and one that really has a backslash as `caf\\xe9`.
    """
    return _UNSHOWN.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if found[0] == "\\":
        return "\\\\"
    if 0xDC80 <= code <= 0xDCFF:  # the byte that Python's surrogateescape stands for
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
