"""Memory that cannot be had is one sentence, and many runs in one process take no more of it than a few."""

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.cli import composed, frozen, tiny, tiny_job
from visprompt.errors import UserError
from visprompt.runs import memory, run_all, unit

pytestmark = frozen
HERE, GPU = (
    "there is not enough memory on this machine: take less",
    "there is not enough memory on the GPU: take less",
)
SHORT = (
    *("+trainer.limit_train_batches=1", "+trainer.limit_test_batches=1", "+trainer.limit_val_batches=1"),
    *("recipe.epochs=1", "recipe.warmup_epochs=0", "logger=csv"),
)
KINDS = (
    ("method=vpt_deep",),
    ("method=linear",),
    ("method=lora",),
    ("method=full", "split=tune"),
    ("data=demo/digits_loc", "method=vpt_shallow"),
    ("data=demo/digits_crowded", "method=bias"),
)


def fails(error):
    def raise_it():
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        (lambda: torch.empty(2**60), HERE),
        (lambda: np.empty(2**58), HERE),
        (fails(MemoryError()), HERE),
        (fails(OSError(errno.ENOMEM, "Cannot allocate memory")), HERE),
        (fails(torch.OutOfMemoryError("Tried to allocate 20.00 MiB.")), GPU),
        (fails(RuntimeError("CUDA error: out of memory")), GPU),
        (
            fails(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
            GPU,
        ),
        (
            fails(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")),
            "there is not enough memory for the loader's workers (data.num_workers=0 starts none): take less",
        ),
    ],
)
def test_memory_that_cannot_be_had_is_one_sentence(action, sentence):
    with pytest.raises(UserError) as caught, memory.explained(lambda: "take less"):
        action()
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "full"), ValueError("odd")]
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, memory.explained(lambda: "take less"):
        raise error
    assert caught.value is error


def test_what_makes_training_take_less():
    rest = "give precision=bf16-mixed, a smaller backbone.image_size or recipe.batch_size, which make another"
    dealt = (
        "give trainer.accumulate_grad_batches={}, which stays the same run (but is refused where batch norm is "
        "trained or a loss compares the images of a batch), or " + rest
    )
    assert memory.of_training(64, 1) == dealt.format(2)
    assert memory.of_training(64, 4) == dealt.format(8)
    assert memory.of_training(15, 1) == dealt.format(3)
    assert memory.of_training(12, 1, devices=4) == dealt.format(3), (
        "6 images have no equal parts on 4 devices"
    )
    assert memory.of_training(12, 3, devices=4) == rest
    assert memory.of_training(8, 8) == rest


def test_a_run_that_has_not_enough_memory_fails_with_its_name_and_stops_no_other(tmp_path, monkeypatch):
    original = unit.run_job

    def run_job(one):
        return torch.empty(2**60) if one.job.task == "digits" else original(one)

    monkeypatch.setattr(unit, "run_job", run_job)
    arguments = tiny(tmp_path, *SHORT, "tasks=[digits,digits_loc]", "callbacks=none")
    with composed("train", *arguments) as cfg, pytest.raises(UserError) as caught:
        run_all.train(cfg)
    assert str(caught.value) == (
        "digits/vpt_deep: there is not enough memory on this machine: "
        "give trainer.accumulate_grad_batches=2, which stays the same run (but is refused where batch norm is "
        "trained or a loss compares the images of a batch), or give precision=bf16-mixed, a smaller backbone.image_size or recipe.batch_size, which make another (1 of 2 runs failed)"
    )
    assert [path.parts[-4] for path in tmp_path.rglob("result.json")] == ["digits_loc"]


def resident():
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def flat(logs, count):
    """Runs of several kinds, one after the other.

    Memory, open files and threads after a first round and at the end.
    """
    seen = []
    for number in range(count):
        (outcome,) = run_all.run_all([tiny_job(logs, *SHORT, *KINDS[number % len(KINDS)], f"seed={number}")])
        assert outcome.reason == ""
        threads = [thread.name.partition("_")[0] for thread in threading.enumerate()]
        assert threads.count("leases") <= 2, "one that waits and one that writes, while there are leases"
        others = len(threads) - threads.count("leases")
        seen.append((resident(), len(list(Path("/proc/self/fd").iterdir())), others))
    first, last = seen[2 * len(KINDS) - 1], seen[-1]
    assert last[1:] == first[1:], seen
    assert last[0] < first[0] + 15, seen  # MiB: 250 were lost over 70 runs once


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sixty_runs_take_no_more_than_twelve(tmp_path):
    flat(tmp_path, 60)


@pytest.mark.endurance
@pytest.mark.timeout(3600)
def test_two_hundred_runs_take_no_more_than_twelve(tmp_path):
    flat(tmp_path, 200)
