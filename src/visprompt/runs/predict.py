"""Label a folder of images with a tuned state; without Lightning and Hydra, whose imports take seconds."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from visprompt.data.sources.decoders import decoder_of
from visprompt.data.sources.images import MAX_PIXELS, BadImage
from visprompt.data.sources.own_images import is_supported
from visprompt.data.sources.walk import files_below
from visprompt.data.transforms import to_input
from visprompt.errors import UserError
from visprompt.files import write_atomically
from visprompt.models.api import backbone_of, restore
from visprompt.models.tuned_state import TunedState
from visprompt.runs import memory
from visprompt.runs.result import open_state
from visprompt.runs.run_folder import tidy
from visprompt.text import Terminal, csv_cell

console = Terminal()


@memory.explained(lambda: "give a smaller batch_size=..., or device=cpu")
def predict(
    state: str,
    images: str,
    *,
    output: str,
    batch_size: int,
    device: str,
    weights: str | None,
    overwrite: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Label an image, or every image in a folder and its subfolders, and write a CSV file.

    Files that training leaves out (hidden and system files, other formats) are left out here too. File names
    with characters that cannot be shown are escaped, see `text.visible`.

    Args:
        state: A run's folder, or its tuned.safetensors.
        images: An image, or a folder that is searched with all its subfolders.
        output: The CSV file to write. Its columns are path, class, probability, and one for each class:
            `a.jpg,cat,0.900000,0.900000,0.100000`.
        batch_size: Number of images in a batch.
        device: "auto", "cpu", "cuda" or another device of PyTorch.
        weights: A file of backbone weights; None if the backbone is embedded or timm's.
        overwrite: Whether an existing CSV file may be replaced.
        max_pixels: Images with more pixels are left out, before they are decoded.

    Raises:
        UserError: The state cannot be read, no image can be read, or the CSV file exists.
    """
    path, place, csv_file = Path(state), Path(images), Path(output)
    if type(batch_size) is not int or batch_size < 1:
        raise UserError(
            f"batch_size={batch_size} is not a number of images: give a whole number of 1 or more"
        )
    if csv_file.is_dir():
        raise UserError(f"output={output} is a folder: give the name of a new CSV file")
    if csv_file.exists() and not overwrite:
        raise UserError(
            f"output={output} exists: give overwrite=true to replace it, or the name of a new CSV file"
        )
    tidy(path if path.is_dir() else path.parent)
    tuned = open_state(path)
    left_out: Counter[str] = Counter()
    files, folder = _files(place, left_out)
    classifier = restore(tuned, path, backbone_of(tuned, weights))
    where = find_device(device)
    classifier.to(where)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(csv_cell, ["path", "class", "probability", *tuned.class_names]))
    count = 0
    for names, batch in _batches(files, folder, tuned, batch_size, max_pixels):
        with torch.inference_mode():
            shares = classifier(batch.to(where)).float().softmax(1).cpu()
        if not shares.isfinite().all():
            raise UserError(f"{path} gives no finite probabilities for {names[0]}: tune it again")
        for name, row in zip(names, shares, strict=True):
            best = int(row.argmax())
            figures = [f"{share:.6f}" for share in (row[best], *row)]
            writer.writerow([csv_cell(name), csv_cell(tuned.class_names[best]), *figures])
        count += len(names)
    if not count:
        raise UserError(f"{place} has no image that can be read: give an image or a folder of images")
    write_atomically(csv_file, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))
    console.print(f"{count} of {len(files)} files labelled: {output}", soft_wrap=True)
    if left_out:
        listed = ", ".join(f"{what} ({number})" for what, number in sorted(left_out.items()))
        console.print(f"left out: {listed}", soft_wrap=True)


def _files(place: Path, left_out: Counter[str]) -> tuple[list[Path], Path]:
    """Return the images to label, and the folder to which their paths in the CSV file are relative."""
    if place.is_file():
        return [place], place.parent
    if not place.is_dir():
        raise UserError(f"images={place} is neither an image nor a folder: correct images=...")
    files = sorted(files_below(place, left_out))
    images = [file for file in files if is_supported(file)]
    if len(images) < len(files):
        left_out["files of other formats"] = len(files) - len(images)
    return images, place


def find_device(name: str) -> torch.device:
    """Return the device with a name; "auto" is the GPU if there is one, else the CPU.

    Raises:
        UserError: This machine has no such device.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA
        raise UserError(f"device={name} is not a device of this machine: choose auto, cpu or cuda") from error
    return device


def _batches(
    files: Sequence[Path], root: Path, state: TunedState, size: int, max_pixels: int
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Yield batches of paths and images [B, 3, H, W]; print and leave out files that cannot be read."""
    decode = decoder_of(state.preprocessing, max_pixels)
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
