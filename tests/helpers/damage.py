"""Damaged files for property tests: a bit that is flipped, or an end that is missing, at any place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from visprompt.errors import UserError
from visprompt.files import read_record, write_record

bounded = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def damages(draw: Any) -> Callable[[bytes], bytes]:
    """Functions that flip one bit of a file's bytes, or cut them, at a place that is a share of their length."""
    share, bit = draw(st.floats(0, 1, exclude_max=True)), draw(st.none() | st.integers(0, 7))

    def damage(data: bytes) -> bytes:
        place = int(share * len(data))
        if bit is None:
            return data[:place]
        return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]

    return damage


def outcome(call: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What a call returns and "", or None and the sentence of the `UserError` that it raises."""
    try:
        return call(*arguments), ""
    except UserError as error:
        return None, str(error)


def rewrite(path: Path, **changes: Any) -> None:
    """Changes values of a record and gives it the digest of the new content, as a program would that wrote it."""
    record = read_record(path)
    assert record is not None
    write_record(path, {name: value for name, value in (record | changes).items() if name != "digest"})


def spoil(path: Path, damage: Callable[[bytes], bytes], whole: bytes) -> None:
    """Writes the damaged form of a file's bytes."""
    path.write_bytes(damage(whole))
