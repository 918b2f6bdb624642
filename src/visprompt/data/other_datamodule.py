"""Data modules of datasets outside the papers' benchmarks, one class for each.

See docs/add-a-dataset.md for how to add one.
"""

from visprompt.data.vtab_datamodule import VTABDataModule


class OtherDataModule(VTABDataModule):
    """A dataset that is cut, stored and loaded as VTAB-1k: 800 training, 200 validation and test images."""
