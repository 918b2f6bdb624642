"""What this process may use of the machine: cores, and memory that is free; and its name."""

import os
import platform
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
# limit, use, and the part of the use that are pages of files, which make room: of version 2, of version 1
_VERSIONS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
_UNKNOWN = 2**31  # bytes that are taken for free where the system does not say


def cores() -> int:
    """Return the number of cores that this process may use: by its affinity and its container's quota."""
    from joblib import cpu_count  # imported late: it takes a third of a second

    return int(cpu_count())


def process_name() -> str:
    """Return a name for files of this process; the host tells apart containers, all of whose first is 1."""
    return f"{platform.node()}-{os.getpid()}"


def free_memory() -> int:
    """Return the bytes that are free on this machine and within the limit of this process's container."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration, ValueError):  # not on Linux
        free = _UNKNOWN
    return min([free, *filter(None, map(_free_in_container, _VERSIONS))])


def _free_in_container(names: tuple[str, str, str, str]) -> int | None:
    """Return the bytes up to the limit that a version of cgroups sets; None without a limit."""
    *files, pages = names
    try:
        limit, used, counts = ((_CGROUPS / name).read_text(encoding="ascii") for name in files)
        inactive = dict(line.split() for line in counts.splitlines())[pages]
        return max(1, int(limit) - int(used) + int(inactive))
    except (OSError, KeyError, ValueError):  # no cgroups of this version, or the limit is "max"
        return None
