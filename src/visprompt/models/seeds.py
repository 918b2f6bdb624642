"""Seeds that are derived from a run's seed."""

import hashlib


def epoch_seed(seed: int, epoch: int, rank: int) -> int:
    """Return the seed of torch's generators in a training epoch, which dropout draws from.

    Args:
        seed: Seed of the run.
        epoch: Index of the epoch.
        rank: Index of the process.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch} {rank}".encode()).digest()[:4], "big")
