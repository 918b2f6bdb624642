"""Label a folder of images with tuned states; without Lightning and Hydra, whose imports take seconds."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from visprompt.data.sources.decoders import decoder_of
from visprompt.data.sources.images import MAX_PIXELS, BadImage
from visprompt.data.sources.own_images import is_supported
from visprompt.data.sources.walk import files_below
from visprompt.data.transforms import to_input
from visprompt.errors import UserError
from visprompt.files import write_atomically
from visprompt.models.api import backbone_of, restore
from visprompt.models.bank import Bank
from visprompt.models.classifier import Classifier
from visprompt.models.kind import KINDS
from visprompt.models.tuned_state import TunedState, check_fits
from visprompt.runs import memory
from visprompt.runs.labelled import LabelledImages
from visprompt.runs.predict_masks import check_folder, predict_masks
from visprompt.runs.result import open_state
from visprompt.runs.run_lock import tidy
from visprompt.text import Terminal, csv_cell

console = Terminal()


@memory.explained(lambda: "give a smaller batch_size=..., or device=cpu")
def predict(
    state: str | Sequence[str],
    images: str,
    *,
    output: str | None,
    batch_size: int,
    device: str,
    weights: str | None,
    overwrite: bool = False,
    max_pixels: int = MAX_PIXELS,
    multi_scale: bool = False,
) -> None:
    """Label an image, or every image in a folder and its subfolders, and write a CSV file.

    A segmentation state labels their pixels instead, and writes a folder, see `predict_masks`.

    Files that training leaves out (hidden and system files, other formats) are left out here too. File names
    with characters that cannot be shown are escaped, see `text.visible`.

    Args:
        state: A run's folder, or its tuned.safetensors; or several of one backbone, by which each image is
            labelled in one pass.
        images: An image, or a folder that is searched with all its subfolders.
        output: The CSV file to write, by default `predictions.csv`. Its columns are path, class, probability,
            and one for each class: `a.jpg,cat,0.900000,0.900000,0.100000`. With several states they are path,
            task, class and probability, and an image has a row for each state. If folders have the names of a
            state's classes, there is a column label before class, and the accuracy is printed. Of a
            segmentation state the folder to write, by default `predictions`.
        batch_size: Number of images in a batch, each of which is computed for every state.
        device: "auto", "cpu", "cuda" or another device of PyTorch.
        weights: A file of backbone weights; None if the backbone is embedded or timm's.
        overwrite: Whether an existing CSV file or folder of masks may be replaced.
        max_pixels: Images with more pixels are left out, before they are decoded.
        multi_scale: Whether masks are means over sizes of the image and mirror images.

    Raises:
        UserError: A state cannot be read or is of another backbone, no image can be read, the output exists,
            or there are other states next to a segmentation state.
    """
    paths = [Path(one) for one in ([state] if isinstance(state, str) else state)]
    if len(set(paths)) < max(1, len(paths)):
        raise UserError("state=[...] is empty or names a state twice: give each state once")
    if type(batch_size) is not int or batch_size < 1:
        raise UserError(
            f"batch_size={batch_size} is not a number of images: give a whole number of 1 or more"
        )
    for path in paths:
        tidy(path if path.is_dir() else path.parent)
    tasks = _tasks(paths)
    dense = _is_dense(tasks, multi_scale)
    written = Path(output or ("predictions" if dense else "predictions.csv"))
    (check_folder if dense else _check_file)(written, overwrite)
    left_out: Counter[str] = Counter()
    files, folder = _files(Path(images), left_out)
    if dense:
        classifier = _classifier(tasks[0], weights, find_device(device))
        new = [file for file in files if written.resolve() not in file.resolve().parents]
        count = predict_masks(
            classifier,
            tasks[0].state,
            new,
            folder,
            written,
            multi_scale=multi_scale,
            max_pixels=max_pixels,
        )
        _say(count, len(new), written, left_out)
        return
    shares_of = _model(tasks, weights, find_device(device))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    several = len(tasks) > 1
    paths_below = [file.relative_to(folder).as_posix() for file in files]
    known = [LabelledImages(paths_below, task.state.class_names, KINDS[task.state.kind]) for task in tasks]
    has_labels = any(known)
    columns = [
        *(["task"] if several else []),
        *(["label"] if has_labels else []),
        *("class", "probability"),
        *(() if several else tasks[0].state.class_names),
    ]
    writer.writerow(map(csv_cell, ["path", *columns]))
    count = 0
    for names, batch in _batches(files, folder, tasks, batch_size, max_pixels):
        for name, rows in zip(names, shares_of(batch), strict=True):
            for task, row, labels in zip(tasks, rows, known, strict=True):
                if not row.isfinite().all():
                    raise UserError(f"{task.path} gives no finite probabilities for {name}: tune it again")
                label = labels.add(name, row)
                predicted = KINDS[task.state.kind].named(row, task.state.class_names)
                cells = [
                    *([task.name] if several else []),
                    *([label] if has_labels else []),
                    *(predicted, f"{row.max():.6f}"),
                    *([] if several else [f"{share:.6f}" for share in row]),
                ]
                writer.writerow(map(csv_cell, [name, *cells]))
        count += len(names)
    if not count:
        raise UserError(f"{images} has no image that can be read: give an image or a folder of images")
    write_atomically(written, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))
    for task, labels in zip(tasks, known, strict=True):
        labels.show(console, task.name)
    _say(count, len(files), written, left_out)


def _say(count: int, files: int, output: Path, left_out: Counter[str]) -> None:
    """Print how many files were labelled, and what was left out."""
    console.print(f"{count} of {files} files labelled: {output}", soft_wrap=True)
    if left_out:
        listed = ", ".join(f"{what} ({number})" for what, number in sorted(left_out.items()))
        console.print(f"left out: {listed}", soft_wrap=True)


class _Task(NamedTuple):
    """A tuned state, with its name in the CSV file and its path."""

    name: str
    path: Path
    state: TunedState


Shares = Callable[[Sequence[Sequence[Tensor]]], Sequence[Sequence[Tensor]]]


def _tasks(paths: Sequence[Path]) -> list[_Task]:
    """Read tuned states, named by their tasks, or by their paths if two are of one task."""
    states = [open_state(path) for path in paths]
    names = [state.task for state in states]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [_Task(name, path, state) for name, path, state in zip(names, paths, states, strict=True)]


def _is_dense(tasks: Sequence[_Task], multi_scale: bool) -> bool:
    """Return whether there is one state, and it labels pixels; refuse what cannot be combined with it."""
    dense = next((task for task in tasks if KINDS[task.state.kind].dense), None)
    if dense and len(tasks) > 1:
        raise UserError(
            f"{dense.path} is the state of a segmentation task, whose masks are written to a folder: give "
            "it alone, and the others in another command"
        )
    if multi_scale and not dense:
        raise UserError(
            f"multi_scale=true is for segmentation states, and {tasks[0].path} labels whole images: leave it "
            "out"
        )
    return dense is not None


def _check_file(output: Path, overwrite: bool) -> None:
    """Refuse a CSV file that exists, unless it may be replaced."""
    if output.is_dir():
        raise UserError(f"output={output} is a folder: give the name of a new CSV file")
    if output.exists() and not overwrite:
        raise UserError(
            f"output={output} exists: give overwrite=true to replace it, or the name of a new CSV file"
        )


def _classifier(task: _Task, weights: str | None, device: torch.device) -> Classifier:
    return restore(task.state, task.path, backbone_of(task.state, weights)).to(device)


def _model(tasks: Sequence[_Task], weights: str | None, device: torch.device) -> Shares:
    """Return a function from the inputs of each image, one for each task, to its probabilities by task."""
    if len(tasks) == 1:
        classifier = _classifier(tasks[0], weights, device)

        @torch.inference_mode()
        def one(images: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
            batch = torch.stack([inputs for (inputs,) in images])
            return [[row] for row in classifier.probabilities(classifier(batch.to(device))).cpu()]

        return one
    backbone = backbone_of(tasks[0].state, weights)
    bank = Bank(backbone, device=device)
    for task in tasks:
        check_fits(task.state, task.path, backbone=backbone.record())
        bank.add(task.name, task.state)

    def several(images: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
        held = [bank.task(task.name) for task in tasks]
        logits = bank([x for inputs in images for x in inputs], held * len(images))
        shares = [task.probabilities(row).cpu() for task, row in zip(held * len(images), logits, strict=True)]
        return [shares[i : i + len(held)] for i in range(0, len(shares), len(held))]

    return several


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
    files: Sequence[Path], root: Path, tasks: Sequence[_Task], size: int, max_pixels: int
) -> Iterator[tuple[list[str], list[list[Tensor]]]]:
    """Yield batches of paths and, for each image, its inputs [3, H, W] by task.

    Files that cannot be read are printed and left out.
    """
    # tasks with the same preprocessing share an input
    keys = [json.dumps(dict(task.state.preprocessing), sort_keys=True) for task in tasks]
    preparations = {key: task.state.preprocessing for key, task in zip(keys, tasks, strict=True)}
    decoders = {key: decoder_of(how, max_pixels) for key, how in preparations.items()}
    names: list[str] = []
    images: list[list[Tensor]] = []
    for file in files:
        try:
            inputs = {key: to_input(decode(file), preparations[key]) for key, decode in decoders.items()}
        except BadImage as error:
            console.print(f"left out: {file}: {error}", soft_wrap=True)
            continue
        images.append([inputs[key] for key in keys])
        names.append(file.relative_to(root).as_posix())
        if len(names) == size:
            yield names, images
            names, images = [], []
    if names:
        yield names, images
