"""Importing this module silences what Lightning and timm say on every fit.

Warnings of other kinds still come.
"""

import logging
import warnings

import lightning.pytorch  # noqa: F401  # sets its own levels as it is imported: before those below

# its lines come twice under Hydra's logging, and those below a warning repeat what the run's table says
for _name in ("lightning.pytorch", "lightning.fabric", "timm"):
    logging.getLogger(_name).setLevel(logging.WARNING)
# Lightning 2.6 asks torch's pytrees in the old way
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
# a frozen backbone stays in evaluation mode on purpose
warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
# what is logged at the end of an epoch is the same on every rank already
warnings.filterwarnings("ignore", message=r"It is recommended to use `self.log\(.*sync_dist=True\)`")
# every figure is logged at the end of an epoch, whatever the interval of steps
warnings.filterwarnings(
    "ignore", message=r"The number of training batches \(\d+\) is smaller than the logging"
)
# images are decoded once and lie in memory or in a memory map: more workers would not help
warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers")
