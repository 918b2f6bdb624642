"""Measure the importance of prompt tokens and segments, prune the least important, rewind to initial values.

E^2VPT (Han et al., ICCV 2023, section 3.3) after XPrompt (Ma et al., EMNLP 2022): prompt token j is
multiplied by a mask rho_j, and each of its S segments by a mask rho_jk. The importance of a mask is the mean
over the images i of |dL_i / d rho| at rho = 1. The least important tokens and segments are pruned, and the
rest is trained again from its initial values.

Differences from the released code: the absolute value is taken, for each image; masks are never trained;
"rewinding" restores exactly the initial values; and "nothing pruned" is one of the choices.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from visprompt.errors import UserError
from visprompt.models.classifier import Classifier
from visprompt.models.methods.e2vpt import E2VPT
from visprompt.models.tensors import hash_tensors
from visprompt.models.tuned_state import TunedState, load_state, save_state
from visprompt.runs.result import markdown_table

MIN_TOKENS = 1
MIN_SEGMENTS = 4  # of each token that is kept
_DIGITS = 16  # hexadecimal digits of the hash that names stored initial values


@dataclass(frozen=True)
class Importance:
    """Importance of tokens and segments, at least 0.

    Attributes:
        tokens: float64 [1, p], or [layers, p] for masks per layer.
        segments: float64 [1, p, S], or [layers, p, S].
    """

    tokens: Tensor
    segments: Tensor

    def lists(self) -> dict[str, Any]:
        """Return the importance as nested lists for JSON; `of` restores the same numbers."""
        return {"tokens": self.tokens.tolist(), "segments": self.segments.tolist()}

    @classmethod
    def of(cls, lists: Mapping[str, Any]) -> "Importance":
        """Build the importance from the nested lists of `lists`."""
        tokens, segments = (torch.tensor(lists[name], dtype=torch.float64) for name in ("tokens", "segments"))
        return cls(tokens, segments)


@dataclass(frozen=True)
class Masks:
    """Which tokens and segments are kept (true) and pruned (false).

    Attributes:
        tokens: bool [1 or layers, p]; 1 if all layers share their masks.
        segments: bool [1 or layers, p, S], false for the segments of pruned tokens.
    """

    tokens: Tensor
    segments: Tensor

    def options(self) -> dict[str, Any]:
        """Return the masks as options of the method.

        Example:
            {"token_mask": [1, 0], "segment_mask": [[1, 0, 1, 1], [0, 0, 0, 0]]}, or a list of these for each
            layer.
        """
        tokens, segments = self.tokens.int(), self.segments.int()
        if len(tokens) == 1:
            tokens, segments = tokens[0], segments[0]
        return {"token_mask": tokens.tolist(), "segment_mask": segments.tolist()}


@dataclass(frozen=True, order=True)
class Point:
    """A point of the grid of pruning; points that keep less sort first.

    Attributes:
        kept_tokens: Number of tokens kept in each layer.
        kept_segments: Number of segments kept of each of these tokens.
    """

    kept_tokens: int
    kept_segments: int


def importance(classifier: Classifier, batches: Iterable[tuple[Tensor, Tensor]]) -> Importance:
    """Return the mean over the images of the absolute gradient of each image's loss in the masks.

    Every image gets separate masks, so that one backward pass gives the gradients of all images. Give a
    classifier and images in float64: scaling a whole token changes little if a norm follows and the token's
    output is dropped (deep prompts on a pre-norm block), because LN(rho P) = LN(P) except for the norm's
    epsilon. A token's importance is then smaller than the rounding errors of float32.

    Args:
        classifier: A trained classifier whose method is an unpruned `E2VPT` with input prompts; it is
            unchanged afterwards.
        batches: Normalised images [B, 3, H, W] and their labels, each image once.

    Returns:
        The importance. If the layers share their masks, gradients are summed over the layers before the
        absolute value is taken.
    """
    method = classifier.method
    assert isinstance(method, E2VPT)  # for the type checker
    assert method.num_tokens
    assert method.token_mask is None
    training, count = classifier.training, 0
    shape = (method.depth, method.num_tokens, method.num_segments)
    layers = method.depth if method.mask_per_layer else 1
    tokens = torch.zeros(layers, *shape[1:2], dtype=torch.float64)
    segments = torch.zeros(layers, *shape[1:], dtype=torch.float64)
    classifier.eval()
    try:
        for images, labels in batches:
            method.gates = torch.ones(
                len(images), *shape, dtype=images.dtype, device=images.device, requires_grad=True
            )
            # a sum, so that the gradient in an image's masks is that of this image's loss alone
            loss = classifier.kind.loss(classifier(images), labels).sum()
            (gradient,) = torch.autograd.grad(loss, method.gates)
            gradient = gradient.double().cpu()
            if not method.mask_per_layer:
                gradient = gradient.sum(1, keepdim=True)
            segments += gradient.abs().sum(0)
            tokens += gradient.sum(-1).abs().sum(0)  # a token's mask multiplies all of its segments
            count += len(images)
    finally:
        method.gates = None
        classifier.train(training)
    return Importance(tokens / count, segments / count)


def grid(tokens: Sequence[int], segments: Sequence[int], num_tokens: int, num_segments: int) -> list[Point]:
    """Return the points to try.

    Args:
        tokens: Percentages of tokens to prune, rounded down to whole tokens; at least 1 token is kept.
        segments: Percentages of each token's segments to prune, rounded down; at least 4 are kept.
        num_tokens: Number of tokens (p).
        num_segments: Number of segments of a token (S).

    Returns:
        Distinct points; those that keep less are first, and the last one prunes nothing.
    """
    points = {Point(num_tokens, num_segments)}
    for token, segment in product(tokens, segments):
        points.add(Point(_kept(num_tokens, token, MIN_TOKENS), _kept(num_segments, segment, MIN_SEGMENTS)))
    return sorted(points)


def _kept(count: int, percentage: int, least: int) -> int:
    return max(min(least, count), count - count * percentage // 100)


def prune(scores: Importance, point: Point) -> Masks:
    """Keep the most important tokens, and the most important segments of each of them.

    Args:
        scores: Importance of tokens and segments.
        point: How many of them are kept.

    Returns:
        The masks; among equally important tokens or segments the first are kept.
    """
    tokens = _largest(scores.tokens, point.kept_tokens)
    return Masks(tokens, _largest(scores.segments, point.kept_segments) & tokens.unsqueeze(-1))


def _largest(values: Tensor, count: int) -> Tensor:
    """Mark the largest values along the last dimension: [3, 9, 5] with count 2 gives [0, 1, 1]."""
    first = values.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros(values.shape, dtype=torch.bool).scatter(-1, first, True)


def store_initial(folder: Path, state: TunedState) -> str:
    """Store the initial values of an unpruned classifier in a file named by their hash.

    Args:
        folder: The folder of all runs of a method on a task.
        state: The initial values.

    Returns:
        The hash; it is the option `initial` of the runs that start from these values.
    """
    name = hash_tensors(state.tensors)[:_DIGITS]
    path = folder / initial_file(name)
    if not path.is_file():
        save_state(path, state)
    return name


def has_initial(folder: Path, name: str) -> bool:
    """Return whether a folder has the initial values with a hash."""
    return (folder / initial_file(name)).is_file()


def rewind(classifier: Classifier, folder: Path) -> None:
    """Set a classifier to the stored initial values that its method names, as far as its masks keep them.

    Args:
        classifier: Any classifier; nothing happens if its method names no initial values.
        folder: The folder with the values, see `store_initial`.

    Raises:
        UserError: The values are missing or damaged.
    """
    method = classifier.method
    if not isinstance(method, E2VPT) or method.initial is None:
        return
    path = folder / initial_file(method.initial)
    if not path.is_file():
        raise UserError(f"{path} is missing, which has the initial values of this run: run split=tune again")
    tensors = dict(load_state(path).tensors)
    if hash_tensors(tensors)[:_DIGITS] != method.initial:
        raise UserError(
            f"{path} holds other initial values than its name says: delete it and run split=tune again"
        )
    if method.token_mask is not None:
        current = classifier.tuned_state()
        tensors |= {name: current[name] for name in ("token_mask", "segment_mask")}
        # the prompts are one tensor "prompts", or one tensor "prompts.<layer>" for each layer
        by_layer = [f"prompts.{layer}" for layer in range(method.depth) if f"prompts.{layer}" in current]
        prompts = [tensors[name] for name in by_layer] if by_layer else tensors["prompts"]
        device = current[by_layer[0] if by_layer else "prompts"].device
        kept = method.unpruned(layer.to(device) for layer in prompts)
        tensors |= dict(zip(by_layer, kept, strict=True)) if by_layer else {"prompts": torch.stack(kept)}
    classifier.load_tuned_state(tensors)


def initial_file(name: str) -> str:
    """Return the path of the initial values with a hash, in the folder of all runs of a method on a task."""
    return f"initial/{name}.safetensors"


def masks_of(options: Mapping[str, Any], layers: int = 1) -> Masks:
    """Return the masks in a method's options.

    Args:
        options: The method's options.
        layers: Number of layers of the returned masks if the options have none, so that everything is kept.
    """
    shape = (layers, options["num_tokens"], options["num_segments"])
    if options["token_mask"] is None:
        return Masks(torch.ones(shape[:2], dtype=torch.bool), torch.ones(shape, dtype=torch.bool))
    tokens, segments = (torch.tensor(options[name]).bool() for name in ("token_mask", "segment_mask"))
    return Masks(tokens, segments) if tokens.ndim == 2 else Masks(tokens[None], segments[None])


def table(masks: Masks, scores: Importance) -> str:
    """Return a Markdown table of the segments that are kept of each token.

    Args:
        masks: The masks.
        scores: Importance of the tokens.

    Returns:
        A table with a row for every token of every layer; a single layer "all" if they share their masks.
    """
    rows = []
    for layer, (tokens, segments) in enumerate(zip(masks.tokens, masks.segments, strict=True)):
        name = "all" if len(masks.tokens) == 1 else str(layer + 1)
        for token, is_kept in enumerate(tokens.tolist()):
            score = float(scores.tokens[layer, token])
            kept = _ranges(segments[token].nonzero().flatten().tolist()) if is_kept else "pruned"
            rows.append([name, str(token + 1), f"{score:.3g}", kept])
    return markdown_table(["layer", "token", "importance", "segments left"], rows)


def _ranges(indices: Sequence[int]) -> str:
    """Return indices counted from 0 as ranges counted from 1: [0, 1, 2, 3, 6] gives "1-4, 7"."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1]:
            ranges[-1][1] = index + 1
        else:
            ranges.append([index + 1, index + 1])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in ranges)


COLOURS = {"kept": "#2f6db5", "segment pruned": "#d9e4f0", "token pruned": "#e8a87c"}
_CELL, _GAP, _HEAD = 18, 44, 96  # pixels
_PANELS = 4  # in a row


def picture(masks: Masks, title: str) -> Image.Image:
    """Draw which segments of which tokens are kept: one panel for each layer, or one for all layers.

    Args:
        masks: The masks.
        title: The title, one line or several.
    """
    layers, count, segments = masks.segments.shape
    tall = min(_CELL, max(4, 640 // count))
    width, height = segments * _CELL + _GAP, count * tall + _GAP + 16
    columns = min(layers, _PANELS)
    top = _HEAD + 20 * title.count("\n")
    font, small = ImageFont.load_default(16), ImageFont.load_default(12)
    wide = max(columns * width, 500, *(int(font.getlength(line)) for line in title.split("\n")))
    size = (wide + 2 * _GAP, top + -(-layers // columns) * height + _GAP // 2)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.multiline_text((_GAP, 12), title, "black", font)
    left = _GAP
    for word, colour in COLOURS.items():
        draw.rectangle((left, top - 50, left + 14, top - 36), colour, "black")
        draw.text((left + 20, top - 51), word, "black", small)
        left += 150
    for layer in range(layers):
        x, y = _GAP + layer % columns * width, top + layer // columns * height
        name = "all layers" if layers == 1 else f"layer {layer + 1}"
        draw.text((x, y - 18), f"{name}: token down, segment across", "black", small)
        _panel(draw, (x, y), masks.tokens[layer], masks.segments[layer], tall, small)
    return image


def _panel(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], tokens: Tensor, segments: Tensor, tall: int, font: Any
) -> None:
    """Draw a layer's tokens as rows and their segments as columns, numbered from 1."""
    left, top = corner
    every = 1 if tall >= 12 else -(-12 // tall)
    for row, (kept, parts) in enumerate(zip(tokens.tolist(), segments.tolist(), strict=True)):
        y = top + row * tall
        if row % every == 0:
            draw.text((left - 6, y + tall // 2), str(row + 1), "black", font, anchor="rm")
        for column, part in enumerate(parts):
            colour = COLOURS["kept" if part else "segment pruned" if kept else "token pruned"]
            x = left + column * _CELL
            draw.rectangle((x, y, x + _CELL, y + tall), colour, "white")
    for column in range(0, segments.shape[1], 1 if segments.shape[1] < 10 else 3):
        x = left + column * _CELL + _CELL // 2
        draw.text((x, top + len(tokens) * tall + 3), str(column + 1), "black", font, anchor="mt")
