"""TFRecord files and the tf.train.Example messages in them, without TensorFlow.

A record is a uint64 length, the masked CRC-32C of these 8 bytes, the data and the masked CRC-32C of the data, all
little-endian (tensorflow/core/lib/io/record_writer.h). An Example is the protobuf message
`{features: 1 {feature: 1 map<string, {bytes_list: 1 | float_list: 2 | int64_list: 3}>}}`
(tensorflow/core/example/feature.proto); its lists of floats, which no dataset here has, are left out.
"""

import struct
from collections.abc import Iterator, Mapping
from itertools import count
from typing import IO

from visprompt.errors import UserError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types
_MASK = 0xA282EAD8


def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [(value >> 1) ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return table


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of some bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF


def read_records(stream: IO[bytes], name: str) -> Iterator[bytes]:
    """Yield the data of each record, one at a time.

    The checksum of the length is checked, so that no damage can make a length of it. That of the data is not: in Python
    it takes a second for every few MB, and the archive's own checksum covers the same bytes.

    Args:
        stream: The file, read straight through.
        name: What errors call it.

    Raises:
        UserError: A record is cut off or its length is damaged.
    """
    for number in count(1):
        head = stream.read(12)
        if not head:
            return
        if len(head) < 12 or _masked(head[:8]) != struct.unpack("<I", head[8:])[0]:
            raise _damaged(name, number, "has no valid length")
        (length,) = struct.unpack("<Q", head[:8])
        data = stream.read(length + 4)
        if len(data) < length + 4:
            raise _damaged(name, number, "is cut off")
        yield data[:length]


def _damaged(name: str, number: int, what: str) -> UserError:
    return UserError(f"{name} is truncated or damaged (record {number} {what}): delete it and run the command again")


def record(data: bytes) -> bytes:
    """Return the record that holds some data."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", _masked(length)) + data + struct.pack("<I", _masked(data))


class Example(dict[str, list[bytes] | list[int]]):
    """The features of a tf.train.Example by name; `text` and `number` return those that hold a single value."""

    def text(self, name: str) -> bytes:
        """Return the one text of a feature.

        Raises:
            ValueError: The feature is not there or holds something else.
        """
        match self.get(name):
            case [bytes(value)]:
                return value
        raise ValueError(f"no text {name!r}")

    def number(self, name: str) -> int:
        """Return the one integer of a feature.

        Raises:
            ValueError: The feature is not there or holds something else.
        """
        match self.get(name):
            case [int(value)]:
                return value
        raise ValueError(f"no integer {name!r}")


def parse_example(data: bytes) -> Example:
    """Read a tf.train.Example.

    Args:
        data: The message as it lies in a record.

    Returns:
        The lists of bytes and of integers by feature name.

    Raises:
        ValueError: The message is damaged.
    """
    example = Example()
    for features in _children(memoryview(data), 1):
        for entry in _children(features, 1):
            pair = {number: value for number, value in _fields(entry) if isinstance(value, memoryview)}
            name = bytes(pair.get(1, b"")).decode()
            for kind, values in _fields(pair.get(2, memoryview(b""))):
                if kind in (1, 3) and isinstance(values, memoryview):
                    example[name] = _texts(values) if kind == 1 else _integers(values)
    return example


def _children(data: memoryview, wanted: int) -> Iterator[memoryview]:
    return (value for number, value in _fields(data) if number == wanted and isinstance(value, memoryview))


def _texts(data: memoryview) -> list[bytes]:
    return [bytes(value) for value in _children(data, 1)]


def _integers(data: memoryview) -> list[int]:
    """Read an Int64List, whose values lie one by one or packed."""
    found: list[int] = []
    for _, value in _fields(data):
        position = 0
        while isinstance(value, memoryview) and position < len(value):
            integer, position = _varint(value, position)
            found.append(integer)
        if isinstance(value, int):
            found.append(value)
    return [value - (1 << 64) if value >> 63 else value for value in found]


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of a message's fields."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        if tag & 7 == _VARINT:
            integer, position = _varint(data, position)
            yield tag >> 3, integer
            continue
        length, position = _length(data, position, tag & 7)
        if position + length > len(data):
            raise ValueError("a field is longer than its message")
        yield tag >> 3, data[position : position + length]
        position += length


def _length(data: memoryview, position: int, wire: int) -> tuple[int, int]:
    if wire == _BYTES:
        return _varint(data, position)
    if wire in (_FIXED32, _FIXED64):
        return 4 if wire == _FIXED32 else 8, position
    raise ValueError(f"a field has the unknown wire type {wire}")


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift, byte in enumerate(data[position : position + 10]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, position + shift + 1
    raise ValueError("an integer is cut off")


def build_example(features: Mapping[str, bytes | int]) -> bytes:
    """Return the tf.train.Example that holds one text or integer per feature."""
    entries = []
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = _field(1, _field(1, value))
        else:
            feature = _field(3, _field(1, _to_varint(value % (1 << 64))))  # packed, as TensorFlow writes it
        entries.append(_field(1, _field(1, name.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries))


def _field(number: int, data: bytes) -> bytes:
    return _to_varint(number << 3 | _BYTES) + _to_varint(len(data)) + data


def _to_varint(value: int) -> bytes:
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
