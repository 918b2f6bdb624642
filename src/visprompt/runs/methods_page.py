"""docs/methods.md, made of configs/method: `python -m visprompt.runs.methods_page > docs/methods.md`."""

import re
from collections.abc import Iterator

from visprompt.models.methods import METHODS
from visprompt.runs.paths import CONFIGS

_HEAD = """# Methods

Made of the files in [configs/method](../configs/method) by `make docs`; change those, not this page.

`method=NAME` chooses a method, `method.OPTION=VALUE` one of its options. Every method tunes a head as well.
What an option means is said next to it in the method's config; the file of its class in
[src/visprompt/models/methods](../src/visprompt/models/methods) opens with the paper, its equation, and where
the code differs from the released one. [Which method works on which backbone](methods-by-backbones.md).
"""


def markdown() -> str:
    """Return the page."""
    lines = [_HEAD, "| method | what is tuned, besides the head | options |", "| :-- | :-- | :-- |"]
    return "\n".join([*lines, *map(_row, METHODS)]) + "\n"


def _row(method: str) -> str:
    text = (CONFIGS / "method" / f"{method}.yaml").read_text(encoding="utf-8")
    options = ", ".join(f"`{option}`" for option in _options(text))
    return f"| `{method}` | {text.splitlines()[0].removeprefix('# ')} | {options} |"


def _options(text: str) -> Iterator[str]:
    yield from (key for key in re.findall(r"^(\w+):", text, re.MULTILINE) if key != "name")


if __name__ == "__main__":
    print(markdown(), end="")
