"""Throughput of a bank whose batches mix tasks, beside what serves the same tasks without it.

Every task is VPT-deep with random values. Lengths from 1 to `--longest` prompts and classes from 2 to 397 are
spread evenly. Ways through the same frozen backbone, in inference mode:

- single: one classifier whose prompts have the bank's mean length, for the whole batch: the measure;
- bank N: a batch whose images belong to N tasks in turn;
- passes N: the same images without a bank, one pass of the backbone for each task (what one has today, where
  states are loaded on one model);
- models N: the same images, each by the model of its task (what full fine-tuning leaves), for every N of
  `--models`, whose N copies of the backbone must fit in memory;
- promptless: linear probing, the limit.

The ways run alternately after one run each that is not counted, and ratios are taken within a round. With
`--states N` that many states are also added to one bank, and what each takes is printed.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from timm.layers import set_fused_attn
from torch import Tensor

from measuring import machine, milliseconds, parser_of
from visprompt.errors import UserError
from visprompt.models.backbones import DEMO, Backbone, BackboneSpec, build_backbone
from visprompt.models.bank import Bank
from visprompt.models.classifier import Classifier
from visprompt.models.contract import Method
from visprompt.models.methods import build_method
from visprompt.models.tuned_state import TunedState

LEAST_CLASSES, MOST_CLASSES = 2, 397  # Retinopathy has 5, SUN397 has 397


def built(options: argparse.Namespace) -> Backbone:
    """Return the backbone; its weights are random but for the demo backbone."""
    set_fused_attn(True)
    return build_backbone(BackboneSpec(name=options.backbone, pretrained=options.backbone == DEMO))


def spread(least: int, most: int, count: int) -> list[int]:
    """Return whole numbers from least to most, evenly spread; their mean is that of the two ends."""
    if count == 1:
        return [(least + most) // 2]
    return [round(least + (most - least) * i / (count - 1)) for i in range(count)]


def state(backbone: Backbone, length: int, classes: int) -> TunedState:
    """Return a tuned state of VPT-deep with random values."""
    classifier = Classifier(backbone.module, method(backbone, length), classes)
    return TunedState(
        tensors={name: tensor.clone() for name, tensor in classifier.tuned_state().items()},
        method={"name": "vpt_deep", "num_tokens": length},
        task="benchmark",
        class_names=tuple(map(str, range(classes))),
        preprocessing={},
        backbone=backbone.record(),
        versions={},
    )


def method(backbone: Backbone, length: int) -> Method:
    """Return VPT-deep, or linear probing for length 0."""
    if not length:
        return build_method("linear", backbone.module)
    return build_method("vpt_deep", backbone.module, num_tokens=length, dropout=0.0)


def classifier(backbone: Backbone, length: int, options: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """Return a classifier in evaluation mode, of the mean number of classes."""
    made = Classifier(backbone.module, method(backbone, length), (LEAST_CLASSES + MOST_CLASSES) // 2)
    return made.to(options.device, options.dtype).eval()


def ways(backbone: Backbone, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Return what is compared, by name."""
    side, batch = backbone.image_size, options.batch
    images = torch.randn(batch, 3, side, side).to(options.device, options.dtype)
    mean = (1 + options.longest) // 2
    single, promptless = (classifier(backbone, length, options) for length in (mean, 0))
    found: dict[str, Callable[[], object]] = {
        "single": lambda: single(images),
        "promptless": lambda: promptless(images),
    }
    for count in options.tasks:
        lengths = spread(1, options.longest, count)
        # the longest prompts do not belong to the task with the most classes
        classes = spread(LEAST_CLASSES, MOST_CLASSES, count)[::-1]
        bank, own = Bank(backbone, device=options.device, dtype=options.dtype), {}
        for i, (length, number) in enumerate(zip(lengths, classes, strict=True)):
            bank.add(str(i), state(backbone, length, number))
            own[str(i)] = classifier(backbone, length, options)
        names = [str(i % count) for i in range(batch)]
        rows = {name: [i for i, other in enumerate(names) if other == name] for name in own}
        found[f"bank {count}"] = lambda bank=bank, names=names: bank(images, names)
        if count > 1:
            found[f"passes {count}"] = lambda own=own, rows=rows: [own[n](images[rows[n]]) for n in own]
        if count in options.models:
            models = [copy.deepcopy(promptless) for _ in own]
            found[f"models {count}"] = lambda models=models, rows=rows: [
                model(images[where]) for model, where in zip(models, rows.values(), strict=True)
            ]
    return found


@torch.inference_mode()
def time_rows(backbone: Backbone, options: argparse.Namespace) -> list[list[str]]:
    """Return for each way its name, images per second, and throughput relative to the single classifier."""
    compared = ways(backbone, options)
    for way in compared.values():
        way()
    rounds = [
        {name: milliseconds(way, options.device) for name, way in compared.items()}
        for _ in range(options.rounds)
    ]
    rows = []
    for name in compared:
        ratios = [times["single"] / times[name] for times in rounds]
        speed = 1000 * options.batch / median(times[name] for times in rounds)
        rows.append([name, f"{speed:.1f}", f"{median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"])
    return rows


def memory_lines(backbone: Backbone, options: argparse.Namespace) -> list[str]:
    """Add states to a bank and return what they take."""
    bank, begin = Bank(backbone, device=options.device, dtype=options.dtype), time.perf_counter()
    lengths, classes = (
        spread(least, most, options.states)
        for least, most in ((1, options.longest), (LEAST_CLASSES, MOST_CLASSES))
    )
    stored = 0
    for i in range(options.states):
        one = state(backbone, lengths[i], classes[-1 - i])
        stored += sum(tensor.nbytes for tensor in one.tensors.values())
        bank.add(str(i), one)
    took = (time.perf_counter() - begin) / options.states
    whole = sum(parameter.nbytes for parameter in bank.module.parameters())
    return [
        f"{options.states} states: {bank.nbytes / options.states / 1e6:.2f} MB each in the bank, "
        f"{stored / options.states / 1e6:.2f} MB each in its file, {1000 * took:.0f} ms to make and add one; "
        f"the backbone, which a full model repeats for each task, is {whole / 1e6:.1f} MB"
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument(
        "--models", type=int, nargs="*", default=[], help="of --tasks: so many full models too"
    )
    parser.add_argument("--longest", type=int, default=100, help="prompts of the longest task")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--states", type=int, default=0, help="add so many states to one bank")
    options = parser.parse_args(arguments)
    backbone = built(options)
    rows = time_rows(backbone, options)
    how = f"batch {options.batch}, {options.dtype}, {options.rounds} rounds"
    print(f"{options.backbone} on {options.device}, {how}; {machine()}\n")
    head = ["way", "images / s", "throughput / single"]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---", "---:", "---:"], *rows)))
    if options.states:
        print("", *memory_lines(backbone, options), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
