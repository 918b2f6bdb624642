"""Images per second of the loader of a VTAB task, beside what copying memory allows.

The store holds random 224-pixel images, which lie in the page cache. Four ways alternate, the ratios are
taken within a round and printed as median [least, greatest]:

- copy: the same images copied out of an array in memory, in random batches: the limit;
- loader: what training uses, GlobalBatches over the memory map, in the main process;
- workers: the same with persistent worker processes;
- decode: JPEG files of the same images decoded by Pillow for every batch, as most codes do.

What the loader adds to the memory that the process holds is printed as well.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from PIL import Image
from torch import Generator
from torch.utils.data import DataLoader

from measuring import machine
from visprompt.data.datasets import SquareDataset, as_is
from visprompt.data.sampler import GlobalBatches
from visprompt.data.stores.manifest import write_manifest
from visprompt.data.stores.square import SCHEMA, SquareStore, read_square
from visprompt.errors import UserError

SIZE = 224


def make_store(folder: Path, count: int) -> SquareStore:
    draw = np.random.default_rng(0)
    with (folder / "pixels.bin").open("wb") as file:
        for _ in range(count):
            file.write(draw.integers(0, 256, 3 * SIZE * SIZE, np.uint8).data)
    manifest = {"schema": SCHEMA, "shape": [count, 3, SIZE, SIZE], "sets": {"test": [0, count]}, "images": ""}
    manifest |= {"keys": [f"test/{row}" for row in range(count)], "labels": {"x": [0] * count}, "record": {}}
    write_manifest(folder, manifest, "benchmark")
    store = read_square(folder)
    if store is None:
        raise UserError(f"{folder} holds no whole store: is its disk full?")
    return store


class Ways:
    """The ways by name; each call is one epoch and returns the number of images seen."""

    def __init__(self, store: SquareStore, batch: int, workers: int) -> None:
        self.count, self.batch = store.shape[0], batch
        self.memory = np.fromfile(store.folder / "pixels.bin", np.uint8).reshape(store.shape)
        self.epoch = 0
        dataset = SquareDataset(store, store.rows(["test"]), "x")
        self.here, self.apart = self._loader(dataset, 0), self._loader(dataset, workers)
        self.jpegs = []
        for row in range(64):
            file = BytesIO()
            Image.fromarray(store.take([row])[0].transpose(1, 2, 0)).save(file, "jpeg", quality=75)
            self.jpegs.append(file.getvalue())

    def _loader(self, dataset: SquareDataset, workers: int) -> DataLoader:
        batches = GlobalBatches(
            num_rows=self.count, batch_size=self.batch, seed=0, epoch=lambda: self.epoch, training=True
        )
        kept = workers > 0
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=as_is,
            num_workers=workers,
            persistent_workers=kept,
            generator=Generator(),
        )

    def copy(self) -> int:
        """Copies rows of the array in memory."""
        order = np.random.default_rng(0).permutation(self.count)
        for start in range(0, self.count, self.batch):
            np.asarray(self.memory[order[start : start + self.batch]])
        return self.count

    def loader(self) -> int:
        """Loads in this process."""
        return self._run(self.here)

    def workers(self) -> int:
        """Loads in worker processes."""
        return self._run(self.apart)

    def decode(self) -> int:
        """Decodes JPEG files."""
        for data in self.jpegs:
            np.asarray(Image.open(BytesIO(data)).convert("RGB"))
        return len(self.jpegs)

    def _run(self, loader: DataLoader) -> int:
        self.epoch += 1
        return sum(len(batch.labels) for batch in loader)


def rate(way: Callable[[], int]) -> float:
    start = time.perf_counter()
    return way() / (time.perf_counter() - start)


def spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), median(values), max(values)
    return f"{middle:,.{digits}f} [{low:,.{digits}f}, {high:,.{digits}f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        ways = Ways(make_store(Path(folder), options.images), options.batch, options.workers)
        names = ("copy", "loader", "workers", "decode")
        for name in names:
            rate(getattr(ways, name))  # fills the page cache and starts the workers
        held = psutil.Process().memory_info().rss
        rounds = [{name: rate(getattr(ways, name)) for name in names} for _ in range(options.rounds)]
        grown = psutil.Process().memory_info().rss - held
    what = f"{options.images:,} images of {SIZE} pixels ({options.images * 3 * SIZE * SIZE / 1e9:.1f} GB)"
    how = f"batch {options.batch}, {options.workers} workers, {options.rounds} rounds"
    print(f"{what}, {how}; {machine()}\n")
    print("| way | images/s | share of copy |\n| --- | ---: | ---: |")
    for name in names:
        shares = [100 * found[name] / found["copy"] for found in rounds]
        print(f"| {name} | {spread([found[name] for found in rounds], 0)} | {spread(shares, 1)} % |")
    print(f"\nmemory held after {options.rounds} rounds: {grown / 2**20:+.0f} MiB")


if __name__ == "__main__":
    main()
