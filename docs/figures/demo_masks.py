"""Draw docs/figures/demo_masks.png: the first test images of digits_masks with the masks of two runs.

`python docs/figures/demo_masks.py logs/digits_masks/linear/HASH logs/digits_masks/vpt_deep/HASH`
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visprompt.data.mask_pictures import COLOURS, overlay
from visprompt.data.sources.digits import compose

ROOT = Path(__file__).resolve().parents[2]
COUNT, TIMES, LEFT, GAP = 6, 3, 110, 8
BAND = np.s_[16:48]  # rows of an image that are not black
WIDTH, HEIGHT = 64 * TIMES, 32 * TIMES
FONT = ImageFont.load_default(15)


def masks_of(run: str, images: list[np.ndarray]) -> list[np.ndarray]:
    """Return the masks that predict.py writes for images, uint8 [64, 64] each."""
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{number}.png" for number in range(len(images))]
        given, written = Path(folder, "images"), Path(folder, "masks")
        given.mkdir()
        for name, image in zip(names, images, strict=True):
            Image.fromarray(image).save(given / name)
        words = [f"state={run}", f"images={given}", f"output={written}"]
        subprocess.run([sys.executable, ROOT / "src" / "predict.py", *words], check=True)
        return [np.asarray(Image.open(written / f"{name}.png")) for name in names]


def draw(rows: dict[str, list[np.ndarray]]) -> Image.Image:
    """Draw a row of pictures for each name, one below the other, and the colour of each digit below."""
    step = HEIGHT + GAP
    page = Image.new("RGB", (LEFT + COUNT * (WIDTH + GAP), len(rows) * step + 34), "white")
    pen = ImageDraw.Draw(page)
    for down, (name, pictures) in enumerate(rows.items()):
        pen.text((8, GAP + down * step + HEIGHT // 2), name, "black", FONT, anchor="lm")
        for across, picture in enumerate(pictures):
            large = Image.fromarray(picture[BAND]).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
            page.paste(large, (LEFT + across * (WIDTH + GAP), GAP + down * step))
    for digit in range(10):
        left, top = LEFT + digit * 64, len(rows) * step + GAP
        pen.rectangle((left, top, left + 24, top + 18), tuple(COLOURS[digit + 1].tolist()))
        pen.text((left + 32, top + 9), str(digit), "black", FONT, anchor="lm")
    return page


def main() -> None:
    """Draw the picture of the two runs on the command line."""
    head, prompts = sys.argv[1:]
    pixels, labels, _ = compose("digits_masks", "test")
    images = [image.transpose(1, 2, 0) for image in pixels[:COUNT]]
    found = {"labels": list(labels[:COUNT].astype(np.uint8))}
    found |= {"linear": masks_of(head, images), "vpt_deep": masks_of(prompts, images)}
    rows = {
        name: [overlay(image, mask) for image, mask in zip(images, masks, strict=True)]
        for name, masks in found.items()
    }
    draw({"image": images} | rows).save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
