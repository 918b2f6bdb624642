"""What a run took: what is asked of a GPU, and when."""

import pytest
import torch

from visprompt.runs import environment


@pytest.mark.parametrize("initialised", [False, True])
def test_a_gpu_that_nothing_has_used_yet_has_no_peak_to_reset(monkeypatch, initialised):
    """torch refuses to reset the statistics of a device before its first use."""
    device, reset = torch.device("cuda:0"), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    environment.reset_peak_memory(device)
    assert reset == [device] * initialised
