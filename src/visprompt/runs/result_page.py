"""docs/result.md, made of the model `Result`: `python -m visprompt.runs.result_page > docs/result.md`."""

from collections.abc import Mapping
from typing import Any

from visprompt.runs.result import Result

_HEAD = """# result.json

Made of `Result` in [result.py](../src/visprompt/runs/result.py) by `make docs`; change that, not this page. A
record that does not fit is refused as damaged. `digest` is the SHA-256 of the other fields.
"""
_JSON = {"object": "object", "array": "list", "string": "text", "integer": "whole number", "number": "number"}


def markdown() -> str:
    """Return the page."""
    fields: Mapping[str, Mapping[str, Any]] = Result.model_json_schema(by_alias=True)["properties"]
    lines = [_HEAD, "| field | JSON | meaning |", "| :-- | :-- | :-- |"]
    lines += [f"| `{name}` | {_words(field)} | {_meaning(field)} |" for name, field in fields.items()]
    return "\n".join(lines) + "\n"


def _words(field: Mapping[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"`{word}`" for word in field["enum"])
    if "anyOf" in field:
        return " or ".join(_words(part) for part in field["anyOf"])
    return f"`{field['const']}`" if "const" in field else _JSON.get(field["type"], field["type"])


def _meaning(field: Mapping[str, Any]) -> str:
    return " ".join(str(field["description"]).split())


if __name__ == "__main__":
    print(markdown(), end="")
