"""A task and a ViT with random weights that the released code of VPT and this code both read.

Images are JPEG files, in the released code's layout (`images/`, `train.json`, `val.json`, `test.json`: names
and classes) and, as hard links to the same files, in a folder for each split and class. The weights are a
`.npz` file with the names and shapes of Google's releases.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIDES = (160, 144)  # width and height of an image in pixels; both codes enlarge its short side to 256
_CROP = 224


@dataclass(frozen=True)
class ViT:
    """Sizes of the backbone.

    Attributes:
        width: Width of the tokens.
        mlp: Inner width of an MLP.
        heads: Attention heads.
        blocks: Number of blocks.
        patch: Side of a patch in pixels.
    """

    width: int = 64
    mlp: int = 256
    heads: int = 2
    blocks: int = 4
    patch: int = 32

    @property
    def tokens(self) -> int:
        """Number of tokens without prompts: the patches and the class token."""
        return (_CROP // self.patch) ** 2 + 1

    def as_dict(self) -> dict[str, int]:
        """Return the sizes by name."""
        return asdict(self)


def write_task(folder: Path, sizes: Mapping[str, int], classes: int, seed: int = 0) -> None:
    """Write the images and both layouts.

    Classes differ in their mean colour, by less than images of one class do, and in nothing else.

    Args:
        folder: Gets `official/` and `ours/`.
        sizes: Number of images of each split: train, val, test.
        classes: Number of classes; image i has class i modulo it.
        seed: Seed of all pixels.
    """
    generator = np.random.default_rng(seed)
    colours = generator.normal(0, 30, (classes, 3))
    images = folder / "official" / "images"
    images.mkdir(parents=True)
    for split, count in sizes.items():
        names = {}
        for number in range(count):
            name, label = f"{split}_{number:05d}.jpg", number % classes
            _write_image(images / name, colours[label], generator)
            names[name] = label + 1  # classes of the published files begin at 1
            linked = folder / "ours" / split / f"class_{label:02d}" / name
            linked.parent.mkdir(parents=True, exist_ok=True)
            os.link(images / name, linked)
        (folder / "official" / f"{split}.json").write_text(json.dumps(names))


def _write_image(file: Path, colour: np.ndarray, generator: np.random.Generator) -> None:
    """Write an image of clouds: coarse noise, enlarged, around the class's colour."""
    coarse = generator.normal(128, 40, (9, 10, 3)) + generator.normal(0, 14, 3) + colour
    small = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
    fine = generator.integers(-12, 13, (SIDES[1], SIDES[0], 1))
    pixels = np.asarray(small.resize(SIDES, Image.Resampling.BICUBIC), np.int16) + fine
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=90)


def write_weights(file: Path, vit: ViT, seed: int = 0) -> None:
    """Write random weights of a ViT under the names of Google's releases (Dosovitskiy et al., ICLR 2021).

    Args:
        file: The `.npz` file to write; its folder is made.
        vit: Sizes of the ViT.
        seed: Seed of the weights.
    """
    generator = np.random.default_rng(seed)

    def drawn(*shape: int, deviation: float) -> np.ndarray:
        return generator.normal(0, deviation, shape).astype(np.float32)

    def linear(name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> dict[str, np.ndarray]:
        deviation = float(np.prod(inputs)) ** -0.5
        bias = drawn(*outputs, deviation=0.02)
        return {f"{name}/kernel": drawn(*inputs, *outputs, deviation=deviation), f"{name}/bias": bias}

    def norm(name: str) -> dict[str, np.ndarray]:
        scale = 1 + drawn(vit.width, deviation=0.02)
        return {f"{name}/scale": scale, f"{name}/bias": drawn(vit.width, deviation=0.02)}

    by_head = (vit.heads, vit.width // vit.heads)
    arrays = linear("embedding", (vit.patch, vit.patch, 3), (vit.width,))
    arrays["cls"] = drawn(1, 1, vit.width, deviation=0.02)
    position = "Transformer/posembed_input/pos_embedding"
    arrays[position] = drawn(1, vit.tokens, vit.width, deviation=0.02)
    for number in range(vit.blocks):
        block = f"Transformer/encoderblock_{number}"
        attention, mlp = f"{block}/MultiHeadDotProductAttention_1", f"{block}/MlpBlock_3"
        arrays |= norm(f"{block}/LayerNorm_0") | norm(f"{block}/LayerNorm_2")
        for name in ("query", "key", "value"):
            arrays |= linear(f"{attention}/{name}", (vit.width,), by_head)
        arrays |= linear(f"{attention}/out", by_head, (vit.width,))
        arrays |= linear(f"{mlp}/Dense_0", (vit.width,), (vit.mlp,))
        arrays |= linear(f"{mlp}/Dense_1", (vit.mlp,), (vit.width,))
    arrays |= norm("Transformer/encoder_norm")
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **arrays)  # type: ignore[arg-type]  # names of arrays, none of which is allow_pickle
