"""What every test, and every process a test starts, runs under: no network, no cluster, one thread.

Set here and not in the Makefile, so that a plain ``pytest`` runs under the same. The libraries read these
when they are imported: this file is loaded before any test and imports none of them.
"""

import gc
import os
import signal
import tempfile
from pathlib import Path

import pytest

# An unreachable hub costs a minute of retries per model; no test needs one.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Copies of mirrors go where other files of the tests go, not into the user's own cache.
os.environ["HF_DATASETS_CACHE"] = str(
    Path(tempfile.gettempdir()) / f"visprompt-tests-{os.getuid()}" / "datasets"
)
os.environ["VISPROMPT_CACHE"] = str(Path(tempfile.gettempdir()) / f"visprompt-tests-{os.getuid()}" / "cache")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
# Several workers with all cores each are slower than one thread each, and bit-equality holds for one number
# of threads.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"

# What surrounds whoever runs the tests (a cluster job, a sweep, Hydra's debugging) would change what tests
# see.
_FOREIGN = ("HYDRA_FULL_ERROR", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_PROJECT", "WANDB_ENTITY")
_LAUNCHERS = (
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
for name in list(os.environ):
    if name in _FOREIGN + _LAUNCHERS or name.startswith(("SLURM_", "TORCHELASTIC_")):
        del os.environ[name]

# A shell starts what it puts into the background with Ctrl-C ignored, and every child would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap():
    """The loop over runs collects garbage after each, which looks at every object of every library: up to a second.

    What is alive before a file's first test stays so, and need not be looked at again.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _quick_configs():
    """Compositions that begin with the same files share what Hydra makes of these."""
    from helpers import quick_configs  # late: it imports the libraries

    quick_configs.install()


@pytest.fixture
def begun(monkeypatch):
    """The W&B runs that were begun, with what they were begun with and how they ended."""
    import wandb  # late: few tests need it

    runs, original = [], wandb.init

    def init(**given):
        one = original(**given)
        finish, log, found = one.finish, one.log, {"config": one.config, "logged": {}, **given}
        one.finish = lambda exit_code: found.update(exit_code=exit_code) or finish(exit_code)
        one.log = lambda metrics: found["logged"].update(metrics) or log(metrics)
        runs.append(found)
        return one

    monkeypatch.setattr(wandb, "init", init)
    return runs
