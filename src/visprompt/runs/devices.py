"""How many devices a trainer config asks for."""

from typing import TYPE_CHECKING

from visprompt.errors import UserError

if TYPE_CHECKING:  # `runs.job` takes seconds to import
    from visprompt.runs.job import Job, Trainer


def local_devices(trainer: "Trainer") -> int:
    """Return the number of devices of this machine that a trainer config asks for."""
    devices = trainer.devices
    if isinstance(devices, list):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        if trainer.accelerator == "cpu":
            return 1
        import torch  # imported late: it takes seconds

        return max(1, torch.cuda.device_count())
    try:
        return int(devices)
    except (TypeError, ValueError):
        raise UserError(
            f"trainer.devices={devices} is not a number: give one, auto, or a list such as [0,1]"
        ) from None


def all_devices(job: "Job") -> int:
    """Return the number of devices of all machines that a job asks for."""
    return local_devices(job.trainer) * int(job.trainer.num_nodes)
