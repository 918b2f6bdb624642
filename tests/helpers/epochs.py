"""Runs that are watched, or end with an error, in the middle of an epoch."""

from contextlib import nullcontext

import pytest

from visprompt.models.tuning_module import TuningModule
from visprompt.runs import run


def trained(one: run.Run, die_in: int | None = None) -> list[int]:
    """Makes a run, which may die in the middle of an epoch; the epochs that it begins, one entry a step."""
    begun, original = [], TuningModule.training_step

    def step(module, *given):
        begun.append(module.current_epoch)
        if module.current_epoch == die_in:
            raise ZeroDivisionError
        return original(module, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TuningModule, "training_step", step)
        with pytest.raises(ZeroDivisionError) if die_in else nullcontext():
            run.run_job(one)
    return begun
