"""Cores and memory within the limits of a container, whose files are written here."""

import pytest

from visprompt import machine

GB = 2**30


def cgroups(folder, version, limit):
    names = {
        1: (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
        2: ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    }[version]
    for name, content in zip(
        names, (limit, 5 * GB // 4, f"anon 7\n{names[3]} {GB // 4}\nslab 1"), strict=False
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{content}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_ends_at_the_limit_of_the_container_of_which_files_pages_are_free(
    tmp_path, monkeypatch, version
):
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    whole = machine.free_memory()
    assert whole > GB, "no limit: what the machine has"
    cgroups(tmp_path, version, 3 * GB // 2)
    assert machine.free_memory() == GB // 2
    cgroups(tmp_path, version, GB // 2)  # lowered below what is in use
    assert machine.free_memory() == 1
    cgroups(tmp_path, version, "max" if version == 2 else 2**63 - 4096)
    assert machine.free_memory() == pytest.approx(whole, rel=0.5)


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert machine.cores() == 1
