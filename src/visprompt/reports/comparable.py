"""Rows that may be held against each other: those under one protocol."""

from collections.abc import Sequence
from dataclasses import dataclass

from visprompt.errors import unknown
from visprompt.reports.collect import Row
from visprompt.reports.summary import same_protocol

_REFERENCES = ("full", "linear")  # what other methods are held against, unless another is named


@dataclass(frozen=True)
class Protocol:
    """Rows with the same backbone, data, preprocessing and precision.

    Attributes:
        words: What the labels of all of them say, so that it need not be said of each; "" where that is nothing.
        rows: In their order.
    """

    words: str
    rows: tuple[Row, ...]

    def name(self, row: Row) -> str:
        """A row's label without what is said of all."""
        said = _parts(self.words)
        return ", ".join(part for part in _parts(row.label) if part not in said)

    def titled(self, title: str) -> str:
        """A title that says which protocol it is of."""
        return f"{title}, {self.words}" if self.words else title


def protocols(rows: Sequence[Row]) -> list[Protocol]:
    """Divides rows by protocol, in the order in which their first rows stand."""
    found: list[list[Row]] = []
    for row in rows:
        alike = next((one for one in found if all(same_protocol(row, other) for other in one)), None)
        if alike is None:
            found.append([row])
        else:
            alike.append(row)
    return [Protocol(_shared([row.label for row in one]), tuple(one)) for one in found]


def _shared(labels: Sequence[str]) -> str:
    """What all labels say behind the name of the method."""
    others = [set(_parts(label)[1:]) for label in labels]
    return ", ".join(part for part in _parts(labels[0])[1:] if all(part in said for said in others))


def _parts(label: str) -> list[str]:
    return label.split(", ") if label else []


def references(found: Sequence[Protocol], against: str | None) -> list[tuple[Protocol, Row]]:
    """The row of each protocol that its others are held against, the one with most tasks of its method.

    Args:
        found: Protocols; those without a row of the method, or with no other, have no reference.
        against: Name of a method. None: full fine-tuning or, where a protocol has none, linear probing.

    Raises:
        UserError: No row is of the method that was named.
    """
    methods = {row.method for protocol in found for row in protocol.rows}
    if against is not None and against not in methods:
        raise unknown("method to compare with among these runs", against, methods)
    taken = []
    for protocol in found:
        for method in _REFERENCES if against is None else (against,):
            rows = [row for row in protocol.rows if row.method == method]
            if rows and len(protocol.rows) > 1:
                taken.append((protocol, max(rows, key=lambda row: len(row.cells))))
                break
    return taken
