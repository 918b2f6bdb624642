"""Draw docs/figures/architecture.svg from the imports of the code: `python docs/figures/architecture.py`.

A box is a package of src/visprompt, an arrow an import; what everything may import (errors, files, machine,
text) is left out. Rows go down from what is called first. An arrow that a longer way down makes plain is left
out; a dashed one goes back up.
"""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "visprompt"
SAYS = {
    "entry points": "train, tune, eval, predict, report, export, serve, ...",
    "runs.cli": "flags, words, hints",
    "tuning": "grid, choice, seeds; pruning; dry runs",
    "runs": "job, identity, run, result; engine, trainer",
    "reports": "tables, tests, figures, page",
    "serving": "endpoints, batches, states of a folder",
    "export": "ONNX, torch.export, timm; the hub",
    "data": "a data module per dataset; sampler",
    "data.stores": "decoded images on disk",
    "data.sources": "downloads, archives, readers",
    "data.catalog": "the records of all tasks",
    "models": "contract, classifier, LightningModule, state",
    "models.methods": "one file per paper",
    "models.backbones": "one file per family; weights",
}
ROWS = (
    ("entry points",),
    ("runs.cli", "tuning", "reports", "export", "serving"),
    ("runs",),
    ("data", "models"),
    ("data.stores", "models.methods", "models.backbones"),
    ("data.sources", "data.catalog"),
)
WIDTH, HEIGHT, GAP, DOWN = 250, 52, 36, 104
COLOURS = {
    "": ("#24292f", "#57606a", "#f6f8fa", "#8c959f"),
    "_dark": ("#e6edf3", "#9198a1", "#161b22", "#6e7681"),
}


def package_of(module: str) -> str:
    """Return the box of a module, "" for what everything imports."""
    parts = module.split(".")[1:]
    if module.split(".")[0] != "visprompt" or not parts:
        return ""
    for depth in (2, 1):
        if ".".join(parts[:depth]) in SAYS:
            return ".".join(parts[:depth])
    return ""


def arrows() -> dict[str, set[str]]:
    """Return which package imports which."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted((ROOT / "src").rglob("*.py")):
        inside = path.is_relative_to(PACKAGE)
        own = (
            package_of(".".join(path.relative_to(ROOT / "src").with_suffix("").parts))
            if inside
            else "entry points"
        )
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for target in {
                    package_of(node.module),
                    *(package_of(f"{node.module}.{a.name}") for a in node.names),
                }:
                    if own and target and target != own:
                        found[own].add(target)
    return found


def shown() -> list[tuple[str, str]]:
    """Return the arrows that are drawn."""
    found = arrows()
    level = {name: number for number, row in enumerate(ROWS) for name in row}
    down = {own: {t for t in targets if level[t] > level[own]} for own, targets in found.items()}

    def reaches(own: str, target: str) -> bool:
        return any(t == target or reaches(t, target) for t in down.get(own, ()))

    return [
        (own, target)
        for own, targets in sorted(found.items())
        for target in sorted(targets)
        if target not in down[own] or not any(reaches(other, target) for other in down[own] - {target})
    ]


def places() -> dict[str, tuple[float, float]]:
    """Return the centre of each box."""
    whole = max(len(row) for row in ROWS) * (WIDTH + GAP)
    found = {}
    for level, row in enumerate(ROWS):
        start = (whole - len(row) * (WIDTH + GAP)) / 2
        for number, name in enumerate(row):
            found[name] = (start + (number + 0.5) * (WIDTH + GAP), 40 + level * DOWN)
    return found


def picture(text: str, faint: str, fill: str, line: str) -> str:
    """Return the SVG in some colours."""
    at, level = places(), {name: number for number, row in enumerate(ROWS) for name in row}
    width, height = max(len(row) for row in ROWS) * (WIDTH + GAP), 40 + (len(ROWS) - 1) * DOWN + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<defs><marker id="a" markerWidth="7" markerHeight="7" refX="6" refY="3" orient="auto">'
        f'<path d="M0,0 L6,3 L0,6" fill="none" stroke="{line}"/></marker></defs>',
    ]
    for own, target in shown():
        (x1, y1), (x2, y2) = at[own], at[target]
        step = level[target] - level[own]
        side = (step > 0) - (step < 0)  # 1 downwards, 0 beside each other, -1 back up
        y1, y2 = y1 + side * HEIGHT / 2, y2 - side * (HEIGHT / 2 + 2)
        if side < 0:
            x1, x2 = x1 + 24, x2 + 24
        if side == 0:
            toward = 1 if x2 > x1 else -1
            x1, x2 = x1 + toward * WIDTH / 2, x2 - toward * (WIDTH / 2 + 2)
        dashes = "" if side > 0 else ' stroke-dasharray="4 3"'
        parts.append(
            f'<path d="M{x1:.0f},{y1:.0f} L{x2:.0f},{y2:.0f}" stroke="{line}" fill="none" '
            f'marker-end="url(#a)"{dashes}/>'
        )
    for name, (x, y) in at.items():
        parts.append(
            f'<rect x="{x - WIDTH / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{WIDTH}" '
            f'height="{HEIGHT}" rx="6" '
            f'fill="{fill}" stroke="{line}"/>'
            f'<text x="{x:.0f}" y="{y - 5:.0f}" text-anchor="middle" font-size="15" '
            f'fill="{text}">{name}</text>'
            f'<text x="{x:.0f}" y="{y + 15:.0f}" text-anchor="middle" font-size="11" '
            f'fill="{faint}">{SAYS[name]}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    for ending, colours in COLOURS.items():
        Path(__file__).with_name(f"architecture{ending}.svg").write_text(picture(*colours))
