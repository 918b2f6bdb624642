"""Labelling a folder of images with a saved state; without Lightning and Hydra, whose imports take seconds."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from visprompt import memory
from visprompt.backbones import Backbone, BackboneSpec, build_backbone
from visprompt.classifier import Classifier
from visprompt.data.decoders import decoder_of
from visprompt.data.folder import BadImage
from visprompt.data.pixels import to_input
from visprompt.errors import UserError
from visprompt.methods import build_method
from visprompt.methods.sidetune import RANDOM
from visprompt.results import open_state
from visprompt.run_folder import settle
from visprompt.state import TunedState, check_fits, write_atomically
from visprompt.terminal import Terminal
from visprompt.text import csv_cell

console = Terminal()


def restore(state: TunedState, path: Path, backbone: Backbone) -> Classifier:
    """Builds the classifier of a tuned state.

    Args:
        state: What was tuned.
        path: Where it came from, for messages.
        backbone: The backbone to put it on; its module becomes part of the classifier.

    Returns:
        The classifier, in evaluation mode.

    Raises:
        UserError: The state was tuned on another backbone.
    """
    check_fits(state, path, backbone=backbone.record())
    options = dict(state.method)
    if "weights" in options:  # the hash of a file that a side network started from: the state brings the values
        options["weights"] = RANDOM
    method = build_method(options.pop("name"), backbone.module, **options)
    classifier = Classifier(backbone.module, method, len(state.class_names))
    classifier.load_tuned_state(state.tensors)
    return classifier.eval()


def backbone_of(state: TunedState, weights: str | None) -> Backbone:
    """Builds the backbone that a tuned state names.

    Args:
        state: The state.
        weights: A file of its weights; None where it is embedded or timm's.
    """
    names = {f.name for f in fields(BackboneSpec)}
    spec = BackboneSpec(**{k: v for k, v in state.backbone.items() if k in names})
    try:
        return build_backbone(replace(spec, weights=weights))
    except UserError as error:
        if weights is not None:
            raise
        raise UserError(
            f"{error}; where the state was tuned on weights of a file, give that file: weights=FILE"
        ) from error


@memory.explained(lambda: "give a smaller batch_size=..., or device=cpu")
def predict(state: str, images: str, *, output: str, batch_size: int, device: str, weights: str | None) -> None:
    """Labels every image below a folder and writes a CSV.

    Args:
        state: A run's folder, or its tuned.safetensors.
        images: A folder; searched with all below it.
        output: The CSV to write: path, class, its probability, and the probability of every class.
        batch_size: Images at a time.
        device: "auto", "cpu", "cuda" or another device of PyTorch.
        weights: A file of backbone weights; None where the backbone is embedded or timm's.

    Raises:
        UserError: The state cannot be read or the folder has no image that can.
    """
    path, folder = Path(state), Path(images)
    settle(path if path.is_dir() else path.parent)
    tuned = open_state(path)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: correct images=...")
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    classifier = restore(tuned, path, backbone_of(tuned, weights))
    where = find_device(device)
    classifier.to(where)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(csv_cell, ["path", "class", "probability", *tuned.class_names]))
    count = 0
    for names, batch in _batches(files, folder, tuned, batch_size):
        with torch.inference_mode():
            shares = classifier(batch.to(where)).float().softmax(1).cpu()
        if not shares.isfinite().all():
            raise UserError(f"{path} gives no probabilities for {names[0]}: its numbers overflow, so tune it again")
        for name, row in zip(names, shares, strict=True):
            best = int(row.argmax())
            figures = [f"{share:.6f}" for share in (row[best], *row)]
            writer.writerow([csv_cell(name), csv_cell(tuned.class_names[best]), *figures])
        count += len(names)
    if not count:
        raise UserError(f"there is no image that can be read in {folder}: give a folder of images")
    write_atomically(Path(output), lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))
    console.print(f"{count} of {len(files)} files labelled: {output}", soft_wrap=True)


def find_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one.

    Raises:
        UserError: There is no such device.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter where it was built without CUDA
        raise UserError(f"device={name} is no device of this machine: choose auto, cpu or cuda") from error
    return device


def _batches(
    files: Sequence[Path], root: Path, state: TunedState, size: int
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Batches of names and prepared images; a file that cannot be read is named and left out."""
    decode = decoder_of(state.preprocessing)
    names: list[str] = []
    inputs: list[torch.Tensor] = []
    for file in files:
        try:
            inputs.append(to_input(decode(file), state.preprocessing))
        except BadImage as error:
            console.print(f"left out: {file}: {error}", soft_wrap=True)
            continue
        names.append(file.relative_to(root).as_posix())
        if len(names) == size:
            yield names, torch.stack(inputs)
            names, inputs = [], []
    if names:
        yield names, torch.stack(inputs)
