"""JSON records that carry a digest of their content: a run's result, a chain's findings, a store's manifest.

The digest finds damage, such as a bit that flipped on a disk. It is no signature: whoever writes a file writes its
digest too.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visprompt.errors import UserError
from visprompt.state import write_atomically

_DIGEST = "digest"


class DamagedRecord(UserError):
    """A record that is there and cannot be trusted; the message says which and why, not what to do about it."""


def digest_of(record: Mapping[str, Any]) -> str:
    """Returns the sha256 (hex) over the canonical JSON of a record, of which "digest" is left out.

    Raises:
        ValueError: A number is not finite, or a value is not one of JSON's.
    """
    content = {key: value for key, value in record.items() if key != _DIGEST}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def record_text(record: Mapping[str, Any], indent: int | None = None) -> str:
    """Returns a record with its digest as JSON.

    Args:
        record: Content by name, for example {"initial": "0f3a"}; its names are texts.
        indent: As in `json.dumps`.

    Raises:
        ValueError: A number is not finite; JSON has no word for it.
    """
    return json.dumps(dict(record) | {_DIGEST: digest_of(record)}, indent=indent, allow_nan=False) + "\n"


def write_record(path: Path, record: Mapping[str, Any], indent: int | None = None) -> None:
    """Writes `record_text` atomically.

    Raises:
        ValueError: A number is not finite.
        UserError: The file cannot be written.
    """
    text = record_text(record, indent)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_record(path: Path) -> dict[str, Any] | None:
    """Reads a record and compares it with its digest.

    Args:
        path: The file.

    Returns:
        The content, with "digest" where the record has one: those of older versions have none, so that the caller has
        to know every name that may occur. None where there is no such file.

    Raises:
        DamagedRecord: The file cannot be read, is no JSON, holds a number that is not finite, or is not what its
            digest says.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedRecord(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DamagedRecord(f"{path} is damaged: it is cut or no JSON") from error
    if not isinstance(record, dict):
        raise DamagedRecord(f"{path} is damaged: it is no JSON object")
    try:
        digest = digest_of(record)
    except (ValueError, RecursionError) as error:
        raise DamagedRecord(f"{path} is damaged: it holds a number that is not finite") from error
    if _DIGEST in record and record[_DIGEST] != digest:
        raise DamagedRecord(f"{path} is damaged: it is not what its digest says")
    return record
