"""Datasets outside the papers' benchmarks, one named data module each.

Docs/add-a-dataset.md says how to add one.
"""

from visprompt.data.vtab_datamodule import VTABDataModule


class OtherDataModule(VTABDataModule):
    """A dataset that is cut, stored and loaded as VTAB-1k is.

    800 training, 200 validation and the test images.
    """
