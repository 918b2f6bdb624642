"""The data module of an image data set of the Hugging Face hub, or of a local one of `datasets`."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from visprompt.data.folder_datamodule import FolderDataModule
from visprompt.data.sources.hf_own import TABLE, HubImages, written
from visprompt.data.sources.own_images import OwnImages
from visprompt.errors import UserError


class HfDataModule(FolderDataModule):
    """A data set of the Hugging Face hub, treated as the user's own images."""

    def __init__(
        self,
        *,
        dataset: str,
        data_dir: str,
        subset: str | None = None,
        revision: str = "main",
        image: str | None = None,
        label: str | None = None,
        split_names: Mapping[str, Any] | str | None = None,
        download: bool = True,
        name: str | None = None,
        **options: Any,
    ) -> None:
        """Check the options; no data is read yet.

        Args:
            dataset: "USER/NAME" on the hub, or a local folder, see `hf_own.HubImages`.
            data_dir: The images are written once into `hf/` in this folder.
            subset: See `HubImages`.
            revision: See `HubImages`.
            image: See `HubImages`.
            label: See `HubImages`.
            split_names: For train, val and test the names of the data set's splits, or slices of them.
            download: Whether a data set on the hub may be downloaded.
            name: Name of the task; by default the last part of the data set's name.
            **options: The arguments of `FolderDataModule`.

        Raises:
            UserError: A value is not valid.
        """
        if split_names == "none":
            raise UserError(
                "data.split_names=none is for folders: give 'data.split_names={train: NAME}' to read one"
            )
        multi_label = options.get("kind") == "multi_label"
        names = split_names if isinstance(split_names, Mapping) else {}
        splits = {str(split): str(name) for split, name in names.items()} or None
        self._hub = HubImages(dataset, subset, revision, image, label, splits, multi_label)
        self._place, self._download = Path(data_dir) / "hf", download
        # the folder is made when the images are first read
        super().__init__(root=str(self._place), csv=TABLE, name=name or self._hub.name, **options)

    @property
    def origin(self) -> str:
        """Return the data set's name; of a local one without its path."""
        return f"hf:{self._hub.dataset if self._hub.local is None else self._hub.name}"

    @cached_property
    def images(self) -> OwnImages:
        """Return the files with their classes and splits, which are written first if they are missing."""
        self.root = written(self._hub, self._place, self._download)
        return super().images
