"""Write a graph as a file of `torch.export`, and read it again."""

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from visprompt.export.check import Runner

FILE = "model.pt2"


def write(program: ExportedProgram, folder: Path) -> None:
    """Write `model.pt2`, without the example that the graph was captured with, which would be a pickle."""
    program.example_inputs = None
    torch.export.save(program, folder / FILE)


def runner(folder: Path) -> Runner:
    """Return a function that computes with the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.load(folder / FILE).module()

    def run(inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits, probabilities = module(inputs)
        return logits, probabilities

    return run
