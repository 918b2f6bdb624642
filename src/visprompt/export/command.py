"""Export a finished run: what `src/export.py` does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from visprompt.errors import UserError, unknown
from visprompt.export import hub_folder, onnx_file
from visprompt.export.pictures import validation
from visprompt.export.push import check_repository, push
from visprompt.export.write import CARD, FORMATS, Request, write
from visprompt.files import publish
from visprompt.models.api import backbone_of, restore
from visprompt.models.kind import KINDS
from visprompt.models.tuned_state import TunedState
from visprompt.runs import memory
from visprompt.runs.quiet import silence_libraries
from visprompt.runs.recorded import own_data
from visprompt.runs.result import Result, open_result, open_state
from visprompt.runs.run_lock import tidy
from visprompt.text import Terminal

console = Terminal()
TARGETS = (*FORMATS, "hub_folder")
_WRITTEN = {CARD, "README.md", "config.json", "tuned.safetensors", "model.safetensors"} | {
    *("model.onnx", "model.onnx.data", "model.pt2")
}


@memory.explained(lambda: "end other programs, or take a machine that has more")
def export(cfg: DictConfig) -> Path:
    """Write a finished run, or a tuned state, in another form, compared with its classifier.

    Args:
        cfg: The config of `src/export.py`.

    Returns:
        The folder that was written.

    Raises:
        UserError: The run cannot be read, a setting does not fit, or the run has no such form.
    """
    silence_libraries()
    folders = [Path(folder) for folder in (cfg.run if OmegaConf.is_list(cfg.run) else [cfg.run])]
    output = Path(cfg.output)
    _check(cfg, folders)
    _check_output(output, cfg.overwrite)
    for folder in folders:
        tidy(folder if folder.is_dir() else folder.parent)
    state = open_state(folders[0])
    if cfg.to == "hub_folder":
        results = [open_result(folder) for folder in folders]
        classifier = restore(state, folders[0], backbone_of(state, cfg.weights))

        def fill(folder: Path) -> None:
            hub_folder.write(folder, state, results, licence=cfg.license, repository=cfg.push)
            hub_folder.check(folder, classifier, cfg.weights)

        _publish(output, fill)
        console.print(f"{output} is written, and loads with the same logits", soft_wrap=True)
        if cfg.push:
            console.print(f"pushed to {push(output, cfg.push, private=cfg.private)}", soft_wrap=True)
        return output
    request = Request(to=cfg.to, include_preprocessing=cfg.include_preprocessing, quantize=cfg.quantize)
    if request.to == "onnx":
        onnx_file.check_installed()
    pictures, about = _validation(cfg, folders[0], state)
    classifier = restore(state, folders[0], backbone_of(state, cfg.weights))
    cards: list[Mapping[str, Any]] = []
    _publish(output, lambda folder: cards.append(write(folder, classifier, state, request, pictures, about)))
    for line in summary(cards[-1]):
        console.print(line, soft_wrap=True)
    console.print(str(output), soft_wrap=True)
    return output


def _check(cfg: DictConfig, folders: Sequence[Path]) -> None:
    """Refuse settings that do not fit together, before anything is loaded."""
    if cfg.to not in TARGETS:
        raise unknown("format", cfg.to, TARGETS)
    to_hub = cfg.to == "hub_folder"
    if not folders:
        raise UserError("run=[] names no run: give the folder of a finished run")
    if len(folders) > 1 and not to_hub:
        raise UserError(
            f"run= has {len(folders)} folders, and to={cfg.to} writes one classifier: give one of them "
            "(several seeds of one protocol are for the card of to=hub_folder)"
        )
    if cfg.push is not None and not to_hub:
        raise UserError(f"push={cfg.push} is for to=hub_folder, and this is to={cfg.to}: leave it out")
    if to_hub and (cfg.quantize or cfg.include_preprocessing):
        raise UserError(
            "quantize and include_preprocessing are for to=onnx, and to=hub_folder writes the tuned state as "
            "it is: leave them out"
        )
    if cfg.push is not None:
        check_repository(cfg.push)


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuse a folder that exists, unless it may be replaced and holds nothing but an export."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"output={output} is a file: give the name of a new folder")
    others = sorted({path.name for path in output.iterdir()} - _WRITTEN)
    if others:
        raise UserError(f"output={output} holds other files, such as {others[0]}: give a new folder")
    if not overwrite and any(output.iterdir()):
        raise UserError(
            f"output={output} exists: give overwrite=true to replace it, or the name of a new folder"
        )


def _publish(output: Path, fill: Any) -> None:
    """Fill a folder that appears under its name only when it is complete."""

    def write_all(folder: Path) -> None:
        fill(folder)
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors makes files that only their owner can read

    publish(output, write_all, lambda: False, option="output")


def _validation(cfg: DictConfig, path: Path, state: TunedState) -> tuple[Any, dict[str, Any] | None]:
    """Return the run's validation images and what the card says of them; None for both without any."""
    folder = path if path.is_dir() else path.parent
    try:
        if not (folder / "result.json").is_file():
            raise UserError(f"{folder} is not a run's folder")
        result: Result = open_result(folder)
        places = {"data_dir": cfg.paths.data_dir, "weights": cfg.weights, "data": own_data(cfg)}
        return validation(folder, state, result, **places)
    except UserError as error:
        console.print(
            f"compared on generated images only, without validation images: {error}", soft_wrap=True
        )
        return None, None


def summary(card: Mapping[str, Any]) -> list[str]:
    """Return what is printed about an export, a line for each comparison."""
    agreement, images = card["agreement"], card["validation"]
    dense = KINDS[card["kind"]].dense
    what, same = ("pixel accuracy", "same classes") if dense else ("accuracy", "same top class")
    lines = [
        f"to={card['to']}: relative error {agreement['error']:.1e} of the logits on {agreement['generated']} "
        "generated images"
    ]
    if images:
        seen = ", which the run trained on" if images["trained_on"] else ""
        lines.append(
            f"{same} on {agreement['same']} of {agreement['images']} images of {images['split_set']}"
            f"{seen}; {what} {100 * agreement['accuracy']:.2f} %"
        )
    if "quantized" in card:
        quantised = card["quantized"]
        lines.append(
            f"int8: {quantised['bytes']:,} bytes instead of {quantised['bytes_before']:,}; {what} "
            f"{100 * quantised['accuracy']:.2f} % ({100 * quantised['change_of_accuracy']:+.2f}), {same} on "
            f"{quantised['same']} of {agreement['images']}"
        )
    return lines
