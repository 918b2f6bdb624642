"""Time and peak memory of a training step: exact prompts, carried prompts, no prompts.

Three ways through the same frozen backbone, all with fused attention:

- exact: VPT-deep whose prompts give keys and values only, and the last block computes only what is pooled;
- carried: the same prompts as tokens through every block in full, as in the papers' codes
(`vit.exact = False`);
- promptless: the exact path with a prompt of length 0. No token is added, yet gradients go as deep as prompts
need,
  into the first block's attention. (Linear probing would be no measure: its backward ends at the head.)

A step is forward, loss and backward in training mode. The ways run alternately, after one step each that is
not counted; ratios are taken within a round of the three and printed as median [least, greatest]. The clock:
CUDA events; on the CPU with one thread (OMP_NUM_THREADS=1) the process's CPU time, which other processes
disturb least; with more, wall time. Memory is what a step adds at its peak: on CUDA to what PyTorch has
allocated; on the CPU (Linux only) to what its own process holds.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from statistics import median

import torch
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

from measuring import added_mib, machine, milliseconds, parser_of
from visprompt.errors import UserError
from visprompt.models.backbones import DEMO, BackboneSpec, build_backbone
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.methods import build_method
from visprompt.models.methods.baselines import Linear

CLASSES = 100
WAYS = ("exact", "carried", "promptless")
COMPARED = ((1, 0), (0, 2), (1, 2))  # which way with which


@dataclass(frozen=True)
class Variant:
    """One way through the backbone; a length of 0 is the promptless pass."""

    length: int = 0
    dropout: float = 0.0
    exact: bool = True

    def __str__(self) -> str:
        return f"{self.length}, dropout {self.dropout}" if self.dropout else str(self.length)


# under dropout keys and values are made for every image, not once per step
DROPOUT_ROW = Variant(50, dropout=0.1)


class Promptless(Linear):
    """A prompt of length 0: gradients reach the first block's attention, where those of a prompt end."""

    def tuned_names(self, classifier: nn.Module) -> frozenset[str]:
        """The head, and one bias to end the gradients' way: a sum over tokens, next to free."""
        return super().tuned_names(classifier) | {"backbone.model.blocks.0.attn.qkv.bias"}


def make_vit(options: argparse.Namespace) -> tuple[ViT, int]:
    """Return the frozen backbone and the side of its images; weights are random but for the demo backbone."""
    set_fused_attn(True)
    backbone = build_backbone(BackboneSpec(name=options.backbone, pretrained=options.backbone == DEMO))
    if backbone.module.carried_blocks():
        raise UserError(f"backbone {options.backbone} has blocks that take no exact path: choose a plain ViT")
    return backbone.module.to(options.device), backbone.image_size


def make_step(variant: Variant, vit: ViT, side: int, options: argparse.Namespace) -> Callable[[], Tensor]:
    """A training step on random images; returns the loss and leaves no gradients behind."""
    torch.manual_seed(0)
    prompts = {"num_tokens": variant.length, "dropout": variant.dropout}
    method = build_method("vpt_deep", vit, **prompts) if variant.length else Promptless(vit)
    classifier = Classifier(vit, method, CLASSES).to(options.device)
    if options.compile:
        classifier.compile()
    images = torch.randn(options.batch, 3, side, side, device=options.device)
    labels = torch.randint(CLASSES, (options.batch,), device=options.device)

    def step() -> Tensor:
        vit.exact = variant.exact
        torch.manual_seed(0)  # the same dropout whichever the way
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            loss = F.cross_entropy(classifier(images), labels)
        loss.backward()
        classifier.zero_grad()
        return loss.detach()

    return step


def step_mib(variant: Variant, options: argparse.Namespace) -> float:
    return added_mib(make_step(variant, *make_vit(options), options), options.device)


def memory_rows(variants: Sequence[Variant], options: argparse.Namespace) -> list[list[str]]:
    def alone(variant: Variant) -> float:
        if options.device == "cuda":
            return step_mib(variant, options)
        # this process has built nothing so far
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as fresh:
            return fresh.submit(step_mib, variant, options).result()

    none, rows = alone(Variant()), []
    for variant in variants:
        ways = [alone(variant), alone(replace(variant, exact=False)), none]
        rows.append(
            [
                str(variant),
                *(f"{mib:.1f}" for mib in ways),
                *(f"{ways[a] / ways[b]:.2f}" for a, b in COMPARED),
            ]
        )
    return rows


def time_rows(variants: Sequence[Variant], options: argparse.Namespace) -> list[list[str]]:
    shared, rows = make_vit(options), []
    # on its own ViT: there a bias asks for a gradient
    none = make_step(Variant(), *make_vit(options), options)
    for variant in variants:
        torch.compiler.reset()  # a cache holds only a few graphs of one forward
        ways = [*(make_step(replace(variant, exact=on), *shared, options) for on in (True, False)), none]
        exact, carried, _ = (way().item() for way in ways)  # warms up, too
        if not math.isclose(exact, carried, rel_tol=2e-2 if options.precision == "bf16" else 1e-5):
            raise UserError(f"{variant} prompts: the exact and the carried path do not compute the same loss")
        rounds = [[milliseconds(way, options.device) for way in ways] for _ in range(options.pairs)]
        ratios = [[times[a] / times[b] for times in rounds] for a, b in COMPARED]
        medians = [f"{median(way):.1f}" for way in zip(*rounds, strict=True)]
        rows.append(
            [str(variant), *medians, *(f"{median(r):.2f} [{min(r):.2f}, {max(r):.2f}]" for r in ratios)]
        )
        print(" | ".join(rows[-1]), file=sys.stderr)
    return rows


def table(unit: str, rows: Sequence[Sequence[str]]) -> str:
    head = ["prompts", *(f"{way}, {unit}" for way in WAYS), *(f"{WAYS[a]} / {WAYS[b]}" for a, b in COMPARED)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---:"] * len(head), *rows))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    parser.add_argument("--batch", type=int, help="64, or 4 for a timm ViT on the CPU")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1, 10, 50, 100, 200], help="prompts of a block"
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args(arguments)
    options.batch = options.batch or (4 if options.device == "cpu" and options.backbone != DEMO else 64)
    variants = [Variant(length) for length in options.lengths] + [DROPOUT_ROW] * (
        DROPOUT_ROW.length in options.lengths
    )
    memory, times = memory_rows(variants, options), time_rows(variants, options)
    compiled = ", compiled" if options.compile else ""
    how = f"batch {options.batch}, {options.precision}{compiled}, {options.pairs} pairs"
    head = f"{options.backbone} on {options.device}, {how}; {machine()}"
    print(head, table("ms", times), table("MiB", memory), sep="\n\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
