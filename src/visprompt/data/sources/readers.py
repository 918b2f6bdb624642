"""Readers of the original files: one function per dataset, and one for archives with a folder per class."""

from collections.abc import Callable, Mapping
from pathlib import Path

from visprompt.data.catalog.task import TaskSpec
from visprompt.data.sources import natural, specialized, structured
from visprompt.data.sources.class_folders import class_folders
from visprompt.data.sources.content import Content

READERS: Mapping[str, Callable[[Path], Content]] = {
    "cifar": natural.cifar,
    "caltech101": natural.caltech101,
    "dtd": natural.dtd,
    "oxford_flowers102": natural.oxford_flowers102,
    "oxford_iiit_pet": natural.oxford_iiit_pet,
    "svhn": natural.svhn,
    "sun397": natural.sun397,
    "patch_camelyon": specialized.patch_camelyon,
    "eurosat": specialized.eurosat,
    "resisc45": specialized.resisc45,
    "diabetic_retinopathy": specialized.diabetic_retinopathy,
    "clevr": structured.clevr,
    "dmlab": structured.dmlab,
    "kitti": structured.kitti,
    "dsprites": structured.dsprites,
    "smallnorb": structured.smallnorb,
}
"""Dataset -> the function that opens a folder with its original files."""


def read_original(spec: TaskSpec, root: Path) -> Content:
    """Open a folder with the original files of a task.

    A dataset that is not in `READERS` has a folder per class.
    """
    return READERS[spec.dataset](root) if spec.dataset in READERS else class_folders(root, spec)
