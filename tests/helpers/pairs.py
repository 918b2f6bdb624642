"""Which method works on which backbone family, as docs/methods-by-backbones.md says.

`make docs` makes that page.
"""

import re
from pathlib import Path

from visprompt.models.methods import METHODS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods-by-backbones.md"


def _table():
    """The page's first table: method -> family -> "yes", the options that work, or the number of the reason."""
    lines = PAGE.read_text().split("| method |")[1].split("\n\n")[0].splitlines()
    families = [cell.strip() for cell in lines[0].strip(" |").split("|")]
    rows = ([cell.strip() for cell in line.strip(" |").split("|")] for line in lines[2:])
    return {method: dict(zip(families, cells, strict=True)) for method, *cells in rows}


_CELLS = _table()


def works(method, family):
    """Whether the page says that a method works on a family, with its default options or with others."""
    assert method in _CELLS, f"{PAGE.name} does not have {method}: run make docs"
    return not re.fullmatch(r"\[\d+\]", _CELLS[method][family])


def working(family):
    """The methods that work on a family."""
    return {method for method in METHODS if works(method, family)}


def options(method, family):
    """What a method has to be given on a family: prompts of pixels, where there are no tokens."""
    cell = _CELLS[method][family]
    found = {"location": "pad"} if cell.startswith("pad") else {}
    return found | ({"depth": 1, "dropout": 0.0} if "with depth=1, dropout=0" in cell else {})
