"""Silence the messages of Lightning and timm that tell a user nothing new."""

import logging
import warnings

_LOGGERS = ("lightning.pytorch", "lightning.fabric", "timm")
_WARNINGS = (
    # Lightning 2.6 calls a deprecated function of torch's pytrees
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # a frozen backbone stays in evaluation mode on purpose
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # figures logged at the end of an epoch are the same on every rank already
    r"It is recommended to use `self.log\(.*sync_dist=True\)`",
    # all figures are logged at the end of an epoch, so the interval in steps does not matter
    r"The number of training batches \(\d+\) is smaller than the logging",
    # decoded images are in memory or memory-mapped, so more workers would not help
    r"The '\w+' does not have many workers",
)


def silence_libraries() -> None:
    """Raise the log level of Lightning and timm to WARNING, and ignore a few known warnings.

    Under Hydra's logging their INFO lines would be printed twice, and the table of a run says the same. Call
    this after `import lightning.pytorch`, which sets its log levels itself. Calling it again does no harm.
    """
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
