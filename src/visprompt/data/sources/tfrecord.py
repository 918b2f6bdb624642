"""TFRecord files and the tf.train.Example messages in them, without TensorFlow.

A record is a uint64 length, the masked CRC-32C of these 8 bytes, the data and the masked CRC-32C of the data,
all little-endian (tensorflow/core/lib/io/record_writer.h).
"""

import struct
from collections.abc import Iterator
from itertools import count
from typing import IO, Any

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message, message_factory

from visprompt.errors import UserError

# tensorflow/core/example/feature.proto, without its lists of floats: no dataset here has any
_MESSAGES: dict[str, list[tuple[str, int, str, str]]] = {
    "BytesList": [("value", 1, "LABEL_REPEATED", "TYPE_BYTES")],
    "Int64List": [("value", 1, "LABEL_REPEATED", "TYPE_INT64")],
    "Feature": [
        ("bytes_list", 1, "LABEL_OPTIONAL", ".BytesList"),
        ("int64_list", 3, "LABEL_OPTIONAL", ".Int64List"),
    ],
    "Entry": [("key", 1, "LABEL_OPTIONAL", "TYPE_STRING"), ("value", 2, "LABEL_OPTIONAL", ".Feature")],
    "Features": [("feature", 1, "LABEL_REPEATED", ".Entry")],
    "Example": [("features", 1, "LABEL_OPTIONAL", ".Features")],
}


def _message_class(name: str) -> Any:
    described = [
        {
            "name": message_name,
            "field": [
                {"name": field, "number": number, "label": label}
                | ({"type": "TYPE_MESSAGE", "typeName": kind} if kind.startswith(".") else {"type": kind})
                for field, number, label, kind in fields
            ],
        }
        for message_name, fields in _MESSAGES.items()
    ]
    proto = descriptor_pb2.FileDescriptorProto(name="example.proto", syntax="proto3")
    json_format.ParseDict({"messageType": described}, proto)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(proto)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


ExampleMessage = _message_class("Example")
"""The protobuf class of tf.train.Example"""


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


def masked_crc32c(data: bytes) -> bytes:
    """Return the checksum that TFRecord stores of some bytes, as the four bytes that it stores."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def read_records(stream: IO[bytes], name: str) -> Iterator[bytes]:
    """Yield the data of each record, one at a time.

    Only the checksum of the length is compared: a damaged length could ask for exabytes. The checksum of the
    data would take a second for every few MB in Python, and the archive's checksum covers the same bytes.

    Args:
        stream: The file, read from start to end.
        name: Name of the file in errors.

    Raises:
        UserError: A record is cut off or its length is damaged.
    """
    for number in count(1):
        head = stream.read(12)
        if not head:
            return
        if len(head) < 12 or masked_crc32c(head[:8]) != head[8:]:
            raise _damaged(name, number, "has no valid length")
        (length,) = struct.unpack("<Q", head[:8])
        data = stream.read(length + 4)
        if len(data) < length + 4:
            raise _damaged(name, number, "is cut off")
        yield data[:length]


def _damaged(name: str, number: int, what: str) -> UserError:
    return UserError(
        f"{name} is truncated or damaged (record {number} {what}): delete it and run the command again"
    )


class Example(dict[str, list[bytes] | list[int]]):
    """The features of a tf.train.Example by name."""

    def text(self, name: str) -> bytes:
        """Return the value of a feature that holds one text.

        Raises:
            ValueError: The feature is missing or holds something else.
        """
        match self.get(name):
            case [bytes(value)]:
                return value
        raise ValueError(f"no text {name!r}")

    def number(self, name: str) -> int:
        """Return the value of a feature that holds one integer.

        Raises:
            ValueError: The feature is missing or holds something else.
        """
        match self.get(name):
            case [int(value)]:
                return value
        raise ValueError(f"no integer {name!r}")


def parse_example(data: bytes) -> Example:
    """Parse the tf.train.Example in a record.

    Raises:
        ValueError: The message is damaged.
    """
    try:
        entries = ExampleMessage.FromString(data).features.feature
    except message.DecodeError as error:
        raise ValueError("a record is not a tf.train.Example") from error
    example = Example()
    for entry in entries:
        for kind in ("bytes_list", "int64_list"):
            if entry.value.HasField(kind):
                example[entry.key] = list(getattr(entry.value, kind).value)
    return example
