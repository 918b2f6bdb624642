"""The validation images of a finished run, as decoded pictures."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from visprompt.data.datasets import RaggedDataset, Ticket, TicketDataset
from visprompt.data.mask_dataset import MaskDataset
from visprompt.errors import UserError
from visprompt.export.check import Picture
from visprompt.export.write import Pictures
from visprompt.models.tuned_state import TunedState
from visprompt.runs import run
from visprompt.runs.evaluate import check_prepared
from visprompt.runs.recorded import job_of
from visprompt.runs.result import Result


def validation(
    folder: Path, state: TunedState, result: Result, **places: Any
) -> tuple[Pictures, dict[str, Any]]:
    """Find the validation images of a run.

    Args:
        folder: The run's folder.
        state: Its tuned state.
        result: Its result.
        **places: Where data and weights are on this machine, see `recorded.job_of`.

    Returns:
        A function that returns the pictures, and what a card says about them.

    Raises:
        UserError: The validation images are not on this machine, or are not those of the run.
    """
    prepared = run.prepare(job_of(folder, state, result, **places))
    check_prepared(prepared, state, result, folder, folder)
    data = prepared.datamodule
    count = data.sizes.get(data.val_set, 0)
    if not count:
        raise UserError(f"{data.task} has no {data.val_set} images")
    about: Mapping[str, Any] = {
        "split_set": data.val_set,
        "images": count,
        "trained_on": data.val_set in data.train_sets[data.split],
    }
    return partial(_pictures, data.val_dataset), dict(about)


def _pictures(dataset: TicketDataset) -> Iterator[Picture]:
    for row, label in enumerate(dataset.labels):
        if isinstance(dataset, MaskDataset):
            batch = dataset[Ticket(row, None, 1.0)]
            picture, label = batch.images[0].numpy().transpose(1, 2, 0), batch.labels[0]
        elif isinstance(dataset, RaggedDataset):  # whole, because `to_input` crops
            picture = dataset.store.image(int(dataset.rows[row]))
        else:
            picture = dataset.pixels([Ticket(row, None, 1.0)])[0].transpose(1, 2, 0)
        yield np.ascontiguousarray(np.broadcast_to(picture, (*picture.shape[:2], 3))), label
