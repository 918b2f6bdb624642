import io
import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.miniatures.structured import build_example, record
from visprompt.data.sources.tfrecord import crc32c, parse_example, read_records
from visprompt.errors import UserError


def test_the_checksum_is_castagnolis():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert crc32c(b"") == 0
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


def test_a_record_is_framed_as_tensorflow_does():
    framed = record(b"abc")
    assert framed[:8] == b"\3" + bytes(7)
    assert framed[12:15] == b"abc"
    (masked,) = struct.unpack("<I", framed[15:])
    rotated = (masked - 0xA282EAD8) % 2**32
    assert ((rotated >> 17) | (rotated << 15)) % 2**32 == crc32c(b"abc")


@given(st.lists(st.binary(max_size=300), max_size=4))
def test_records_come_back(datas):
    assert list(read_records(io.BytesIO(b"".join(map(record, datas))), "a")) == datas


@pytest.mark.parametrize("kept", [1, 11, 12, 28])
def test_a_cut_record_is_named(kept):
    reader = read_records(io.BytesIO(record(b"first") + record(b"second record")[:kept]), "x.tfrecord")
    assert next(reader) == b"first"
    message = r"^x.tfrecord is truncated or damaged \(record 2 (is cut off|has no valid length)\): delete it"
    with pytest.raises(UserError, match=message):
        next(reader)


def test_a_damaged_length_is_never_read():
    framed = bytearray(record(b"abc"))
    framed[7] = 0x7F  # would be 9 exabytes
    with pytest.raises(UserError, match=r"record 1 has no valid length"):
        next(read_records(io.BytesIO(framed), "x"))


def test_an_example_written_by_hand():
    # features { feature { key: "label" value { int64_list { value: 3 value: -1 } } } }, first packed, then
    # one by one
    negative = b"\xff" * 9 + b"\x01"
    for integers in (b"\x0a\x0b\x03" + negative, b"\x08\x03\x08" + negative):
        feature = b"\x1a" + bytes([len(integers)]) + integers
        entry = b"\x0a\x05label\x12" + bytes([len(feature)]) + feature
        features = b"\x0a" + bytes([len(entry)]) + entry
        assert parse_example(b"\x0a" + bytes([len(features)]) + features) == {"label": [3, -1]}


def test_several_texts_and_a_list_of_floats():
    texts = b"\x0a\x04\x0a\x00\x0a\x00"  # bytes_list with two empty values
    floats = b"\x12\x06\x0a\x04\x00\x00\x80\x3f"
    entries = b"".join(
        b"\x0a" + bytes([len(entry)]) + entry
        for entry in (
            b"\x0a\x01t\x12" + bytes([len(texts)]) + texts,
            b"\x0a\x01f\x12" + bytes([len(floats)]) + floats,
        )
    )
    assert parse_example(b"\x0a" + bytes([len(entries)]) + entries) == {"t": [b"", b""]}


@given(
    st.dictionaries(
        st.text(max_size=9), st.binary(max_size=300) | st.integers(-(2**63), 2**63 - 1), max_size=4
    )
)
def test_examples_come_back(features):
    assert parse_example(build_example(features)) == {name: [value] for name, value in features.items()}


@given(st.binary(max_size=60))
def test_other_bytes_are_an_error_or_an_example(data):
    with suppress(ValueError):
        assert isinstance(parse_example(data), dict)


def test_single_values_have_their_kind():
    example = parse_example(build_example({"label": 4, "name": b"x"}))
    assert (example.number("label"), example.text("name")) == (4, b"x")
    with pytest.raises(ValueError, match="no text 'label'"):
        example.text("label")
    with pytest.raises(ValueError, match="no integer 'name'"):
        example.number("name")
    with pytest.raises(ValueError, match="no integer 'gone'"):
        example.number("gone")
