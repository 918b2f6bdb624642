"""Write a report of all runs below some folders: a page, Markdown, CSV, LaTeX and figures, all or nothing."""

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from visprompt.errors import UserError, unknown
from visprompt.reports import figures
from visprompt.reports.load import survey
from visprompt.reports.page import Contents, Picture, contents, page
from visprompt.reports.published import all_published
from visprompt.reports.rows import Row, protocols, references, rows
from visprompt.reports.top import show_top
from visprompt.reports.writers import LATEX_PACKAGES, csv_text, latex, markdown
from visprompt.runs.result import open_result
from visprompt.text import Terminal, in_markdown

if TYPE_CHECKING:
    from visprompt.reports.closeups import Closeups

FORMATS = ("html", "markdown", "csv", "latex", "svg", "png")
_OURS = frozenset({"index.html", "report.md", "report.tex", "tables", "figures"})
console = Terminal()


def report(cfg: DictConfig) -> Path | None:
    """Write the report of a command line, or list the best runs in the terminal.

    Args:
        cfg: What `@hydra.main` composed: runs, top, output, against, paper, inspect, device, data_dir,
            weights, formats.

    Returns:
        The folder it was written to; None with `top`, which writes nothing.

    Raises:
        UserError: There is no run, an argument has an unknown value, or the output folder holds something
            else or cannot be written.
    """
    folders, (output, *_) = _paths(cfg.runs, "runs"), _paths(cfg.output, "output")
    if cfg.paper is not None and cfg.paper not in (papers := {one.paper for one in all_published()}):
        raise unknown("paper", cfg.paper, papers)
    formats = _formats(cfg.formats)
    if cfg.top is None:
        check_place(output)
    found = survey(folders)
    if found.runs.empty:
        also = f" ({len(found.left_out)} are unfinished, damaged or of debugging)" if found.left_out else ""
        raise UserError(
            f"there is no finished run below {' or '.join(map(str, folders))}{also}: name folders that hold "
            "some with runs=FOLDER, or train one with python src/train.py"
        )
    if cfg.top is not None:
        show_top(found.runs, cfg.top, console)
        return None
    made_rows = rows(found.runs)
    if cfg.against is not None:
        _check_against(cfg.against, made_rows)
    closeups = _closeups(cfg, made_rows)
    made = datetime.now(UTC)
    told = contents(found, folders, made, against=cfg.against, paper=cfg.paper, closeups=closeups)
    write(told, output, formats)
    _say(f"report of {len(found.runs)} runs: {output / 'index.html' if 'html' in formats else output}")
    return output


def _say(text: str) -> None:
    console.print(text, soft_wrap=True)


def _paths(given: Any, key: str) -> list[Path]:
    """Return a folder, or a list of them, as paths."""
    listed = list(given) if OmegaConf.is_list(given) else [given]
    if not listed or None in listed:
        raise UserError(f"{key}={given} names no folder: give one, or a list of them")
    return [Path(str(folder)).expanduser() for folder in listed]


def _formats(given: Any) -> tuple[str, ...]:
    listed = list(given) if OmegaConf.is_list(given) else [given]
    for name in listed:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
    if not listed:
        raise UserError(f"formats=[] leaves nothing to write: give some of {', '.join(FORMATS)}")
    return tuple(listed)


def _check_against(against: str, made: Sequence[Row]) -> None:
    """Raise `UserError` if no other row can be tested against a method."""
    if not made:
        raise UserError(
            f"against={against} needs runs of split=final, and found no such run: leave it out, or train some"
        )
    for protocol, reference in references(protocols(made), against):
        others = [row for row in protocol.rows if row is not reference]
        if any(len(row.cells.keys() & reference.cells.keys()) > 1 for row in others):
            return
    raise UserError(
        f"there is nothing to test against {against}: no other row under its protocol shares two tasks with "
        f"it; leave against={against} out, or train it on more of their tasks"
    )


def _closeups(cfg: DictConfig, made: Sequence[Row]) -> "Closeups | None":
    """Return what `inspect` asks for: nothing, one typical run of each row, or the runs of some folders."""
    if cfg.inspect is None:
        return None
    from visprompt.reports.closeups import look, typical

    names = {folder.resolve(): row.label for row in made for folder in row.runs["folder"]}
    folders = typical(made) if cfg.inspect == "auto" else list(dict.fromkeys(_paths(cfg.inspect, "inspect")))
    for folder in folders:
        open_result(folder)  # raises if a folder is wrong, before any run is opened
    seen = look(folders, names, cfg.device, data_dir=cfg.data_dir or cfg.paths.data_dir, weights=cfg.weights)
    for one in seen.left_out:
        _say(f"{one.folder}: {one.why}")
    return seen


def write(told: Contents, output: Path, formats: Collection[str] = FORMATS) -> None:
    """Write a report into its folder, and replace an older one there.

    Args:
        told: The contents.
        output: The folder; it does not exist, is empty, or holds a report.
        formats: Some of `FORMATS`.

    Raises:
        UserError: The folder holds something else or cannot be written; an older report is still there.
    """
    check_place(output)
    _replace(output, lambda folder: _fill(told, folder, formats))


def check_place(output: Path) -> None:
    """Check that a report would replace nothing but a report.

    Raises:
        UserError: The path is a file, or a folder that holds anything else than a report.
    """
    others = sorted({path.name for path in output.iterdir()} - _OURS) if output.is_dir() else []
    if others or (output.exists() and not output.is_dir()):
        held = f"holds {others[0]}, which is not part of a report" if others else "is a file"
        raise UserError(f"{output} {held}: name another folder with output=FOLDER")


def _replace(output: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder next to the output, and replace the output with it once it is complete."""
    beside: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
        new, old = beside / "new", beside / "old"
        new.mkdir()
        fill(new)
        if output.exists():
            output.rename(old)
        try:
            new.rename(output)
        except OSError:
            with suppress(OSError):
                old.rename(output)
            raise
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}; name another folder with output=FOLDER") from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _fill(told: Contents, folder: Path, formats: Collection[str]) -> None:
    """Write all files into a folder."""
    plots = [plot for section in told.sections for plot in section.plots]
    listed = [(name, table) for section in told.sections for name, table in section.tables.items()]
    files: dict[str, str | bytes] = {}
    pictures = {}
    if {"html", "svg"} & {*formats}:
        pictures = {
            plot.name: Picture(figures.svg(plot, figures.LIGHT), figures.svg(plot, figures.DARK))
            for plot in plots
        }
    if "html" in formats:
        files["index.html"] = page(told, pictures)
    if "markdown" in formats:
        # the PNG is on white; the SVG's dark text would be lost on a dark page
        ending = next((form for form in ("png", "svg") if form in formats), None)
        files["report.md"] = "\n".join(_markdown(told, ending))
    if "latex" in formats:
        files["report.tex"] = f"% needs {LATEX_PACKAGES}\n" + "\n".join(latex(table) for _, table in listed)
    if "csv" in formats:
        files |= {f"tables/{name}.csv": csv_text(table) for name, table in listed}
        files |= {f"figures/{plot.name}.csv": csv_text(plot.values) for plot in plots if plot.values}
    if "svg" in formats:
        files |= {f"figures/{name}.svg": picture.light for name, picture in pictures.items()}
        files |= {f"figures/{name}_dark.svg": picture.dark for name, picture in pictures.items()}
    if "png" in formats:
        files |= {f"figures/{plot.name}.png": figures.png(plot) for plot in plots}
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _markdown(told: Contents, ending: str | None) -> Iterator[str]:
    """Yield the report as Markdown, paragraph by paragraph, with links to the files of figures."""
    yield f"# {told.title}\n"
    for term, entries in told.facts:
        if len(entries) == 1:
            yield f"- **{term}**: {in_markdown(entries[0])}"
        elif entries:
            yield "\n".join([f"- **{term}**:", *(f"  - {in_markdown(entry)}" for entry in entries)])
    for section in told.sections:
        if section.tables or ending:
            yield f"\n## {section.title}\n"
        yield from (markdown(table) for table in section.tables.values())
        for plot in section.plots if ending else ():
            title, caption, alt = map(in_markdown, (plot.title, plot.caption, plot.alt))
            yield f"### {title}\n\n{caption}\n\n![{alt}](figures/{plot.name}.{ending})\n"
