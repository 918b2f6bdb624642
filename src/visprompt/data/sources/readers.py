"""Readers of the original files, one function per dataset."""

from collections.abc import Callable, Mapping
from pathlib import Path

from visprompt.data.sources import natural, specialized, structured
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
"""Dataset -> function that opens the folder with its original files, or raises `UserError`"""
