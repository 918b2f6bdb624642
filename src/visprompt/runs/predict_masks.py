"""Write the masks that a segmentation state gives to images: indexed PNGs, overlays, shares of classes."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from visprompt.data.mask_pictures import indexed_png, overlay
from visprompt.data.sources.decoders import decoder_of
from visprompt.data.sources.images import BadImage
from visprompt.data.transforms import to_input
from visprompt.errors import UserError
from visprompt.files import publish
from visprompt.models.classifier import Classifier
from visprompt.models.dense_prediction import MultiScale, mask_of
from visprompt.models.tuned_state import TunedState
from visprompt.text import Terminal, csv_cell

console = Terminal()
SHARES = "shares.csv"
_MASK, _OVERLAY = (
    ".png",
    ".overlay.jpg",
)  # behind the whole name of an image, because a.jpg may be next to a.png


def check_folder(output: Path, overwrite: bool) -> None:
    """Refuse a folder that exists, unless it may be replaced and holds nothing but masks.

    Raises:
        UserError: The message says what to give.
    """
    if output.suffix.lower() in (".csv", ".parquet"):
        raise UserError(
            f"output={output} is the name of a table, and the masks of a segmentation state go to a folder: "
            "give the name of a new folder"
        )
    if output.exists() and not output.is_dir():
        raise UserError(
            f"output={output} is a file, and the masks of a segmentation state go to a folder: give the name "
            "of a new folder"
        )
    files = [path for path in output.rglob("*") if not path.is_dir()] if output.exists() else []
    if not files:
        return
    ours = _listed(output / SHARES)
    others = [path for path in files if path.name != SHARES and not _is_ours(path.relative_to(output), ours)]
    if others or output / SHARES not in files:
        first = min(others or files).relative_to(output)
        raise UserError(f"output={output} holds other files, such as {first}: give the name of a new folder")
    if not overwrite:
        raise UserError(
            f"output={output} exists: give overwrite=true to replace it, or the name of a new folder"
        )


def _listed(shares: Path) -> set[str]:
    """Return the images that a table of shares lists; none if it is not one."""
    try:
        with shares.open(encoding="utf-8", newline="") as table:
            return {row[0] for row in csv.reader(table) if row}
    except (OSError, UnicodeDecodeError, csv.Error):
        return set()


def _is_ours(path: Path, images: set[str]) -> bool:
    """Return whether a file is the mask or the overlay of one of the images, and not somebody else's."""
    return any(
        path.name.endswith(ending) and csv_cell(str(path).removesuffix(ending)) in images
        for ending in (_MASK, _OVERLAY)
    )


def predict_masks(
    classifier: Classifier,
    state: TunedState,
    files: Sequence[Path],
    root: Path,
    output: Path,
    *,
    multi_scale: bool,
    max_pixels: int,
) -> int:
    """Write `PATH.png` and `PATH.overlay.jpg` for each image, and `shares.csv` with a row for each.

    Masks have the size of their images, turned upright by their EXIF orientation. Images are computed one by
    one, because they differ in size.

    Args:
        classifier: The state's classifier, in evaluation mode.
        state: The state.
        files: The images; those that cannot be read are printed and left out.
        root: The folder to which PATH is relative.
        output: The folder, which appears when it is complete, and replaces one that is there.
        multi_scale: Whether to average over sizes of the image and mirror images, see `MultiScale`.
        max_pixels: Images with more pixels are left out.

    Returns:
        The number of images that have a mask.

    Raises:
        UserError: No image can be read, the state gives numbers that are not finite, or the folder cannot be
            written.
    """
    decode = decoder_of(state.preprocessing, max_pixels)
    network = MultiScale(classifier).eval() if multi_scale else classifier
    device = next(classifier.parameters()).device
    written = 0

    @torch.inference_mode()
    def fill(folder: Path) -> None:
        nonlocal written
        with (folder / SHARES).open("w", encoding="utf-8", newline="") as table:
            writer = csv.writer(table, lineterminator="\n")
            writer.writerow(map(csv_cell, ["path", "probability", *state.class_names]))
            for file in files:
                try:
                    picture = decode(file)
                except BadImage as error:
                    console.print(f"left out: {file}: {error}", soft_wrap=True)
                    continue
                logits = network(to_input(picture, state.preprocessing)[None].to(device))[0]
                mask = mask_of(logits, (picture.shape[0], picture.shape[1]))
                if not math.isfinite(mask.probability):
                    raise UserError(f"the state gives no finite probabilities for {file}: tune it again")
                name = file.relative_to(root).as_posix()
                place = folder / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.with_name(place.name + _MASK).write_bytes(indexed_png(mask.labels))
                colours = Image.fromarray(overlay(picture, mask.labels))
                colours.save(place.with_name(place.name + _OVERLAY), quality=90)
                shares = np.bincount(mask.labels.ravel(), minlength=len(state.class_names)) / mask.labels.size
                cells = [f"{value:.6f}" for value in (mask.probability, *shares)]
                writer.writerow(map(csv_cell, [name, *cells]))
                written += 1
        if not written:
            raise UserError(f"{root} has no image that can be read: give an image or a folder of images")

    publish(output, fill, lambda: False, option="output")
    return written
