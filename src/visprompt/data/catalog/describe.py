"""Generate docs/datasets.md: `python -m visprompt.data.catalog.describe > docs/datasets.md`."""

from collections.abc import Iterator

from visprompt.data.catalog import TASKS
from visprompt.data.catalog.task import SourceFile, TaskSpec, in_bytes
from visprompt.data.sources.open_source import CIRCULATED

_HEAD = f"""# Datasets

Generated from the catalog (`src/visprompt/data/catalog/`) by `make docs`: change the records, not this page.

`python src/prepare.py tasks=vtab_natural` downloads, checks and decodes; `verify=true` reports missing data
and checks the rest. `tasks=` takes ids, aliases and suites (vtab_natural, vtab_specialized, vtab_structured,
vtab_all, fgvc, all, segmentation); `data=` takes a config, `data=vtab/cifar` for example.

A VTAB task has up to three sources, chosen by `data.source`:

- `raw`: the original files, cut as the benchmark cuts them (md5 order of keys). No image is encoded again
  unless the official task does so. "as published" below says whether this gives the same images and split as
  the benchmark.
- `prepared`: the folder of {CIRCULATED.name} that most papers use, in `data/vtab-1k/`, found under all names
  below. **Its images were saved again as JPEG of quality 75**, which costs 10 to 20 points on CIFAR-100;
  results say "lossy".
- `hf`: a mirror on the Hugging Face hub, where one is known; its commit and the order of its labels are
  checked.

The way in which images are resized is part of a run's `preprocessing=`, and recorded in its result:

| preprocessing | whose code | resizing of VTAB images | pixels |
| :-- | :-- | :-- | :-- |
| `vpt` (default) | VPT, E2VPT | `tf1`, bilinear | ImageNet's mean and std |
| `task_adaptation` | the authors of VTAB | `tf1`, bilinear | in 0..1 |
| `petl` | NOAH, FacT, Convpass, RepAdapter | `pillow`, bicubic | ImageNet's mean and std |
| `model` | none | `pillow`, bilinear | the backbone's mean and std |

`tf1` is TensorFlow 1's arithmetic: no antialias, and output pixel i lies at i * input / output (no half-pixel
centres). `preprocessing.resampling=tf2` is TensorFlow 2's (half-pixel centres, no antialias), which none of
these codes calls; earlier versions of this project used it instead of `tf1`. On images of 32 pixels the two
differ by a shift of 3 of 224 output pixels. Fine-grained images are always resized by Pillow. Results with
different resizing are never averaged together, and each way of resizing has its store of decoded images.

JPEG files are decoded by Pillow; TensorFlow's decoder, which made the published results, may differ by a few
of 256 levels. Results of different sources are never averaged together. The sizes of the files are those of
the download. Afterwards only the store in `data/stores/` is needed (about 22 GB for VTAB-1k at 224 pixels);
the files may be deleted.
"""


def markdown() -> str:
    """Return the page as Markdown."""
    lines = [_HEAD]
    for family, title in (
        ("vtab", "VTAB-1k"),
        ("fgvc", "Fine-grained (FGVC)"),
        ("segmentation", "Segmentation"),
        ("demo", "Demo"),
        ("other", "Other"),
    ):
        specs = [spec for spec in TASKS.values() if spec.family == family]
        if not specs:
            continue
        lines += [f"## {title}", "", *_overview(specs), ""]
        for spec in specs:
            lines += [*_section(spec), ""]
    return "\n".join(lines).rstrip() + "\n"


def _overview(specs: list[TaskSpec]) -> Iterator[str]:
    sets = list(specs[0].split_sizes)
    yield f"| task | kind | classes | {' | '.join(sets)} | download | as published |"
    yield f"|---|---|---:|{'---:|' * len(sets)}---:|---|"
    for spec in specs:
        sizes = " | ".join(f"{size:,}" for size in spec.split_sizes.values())
        link = f"[{spec.id}](#{spec.id})"
        exact = "yes" if spec.exact else "no, see notes"
        yield f"| {link} | {spec.group} | {spec.num_classes} | {sizes} | {_size(spec)} | {exact} |"


def _section(spec: TaskSpec) -> Iterator[str]:
    yield f"### {spec.id}"
    yield ""
    yield spec.description
    yield ""
    yield f"- Config: `data={spec.config}`" + (
        f"; also called {', '.join(spec.aliases)}" if spec.aliases else ""
    )
    yield f"- Source: {spec.source}. <{spec.homepage}>"
    yield f"- Licence: {spec.licence}"
    yield f"- Cite: {spec.citation}"
    yield f"- Labels: {spec.label_rule}"
    if spec.cuts:
        cuts = (f"{name} = {cut.split}[{cut.start}:{cut.stop or ''}]" for name, cut in spec.cuts.items())
        yield f"- Split sets, in md5 order of the keys of each official split: {', '.join(cuts)}"
    if spec.native:
        yield f"- Stored as they are, {spec.native} x {spec.native} pixels; resized on the device"
    if spec.notes:
        yield f"- Notes: {spec.notes}"
    for file in spec.files:
        urls = " or ".join(f"<{url}>" for url in file.urls) or "by hand"
        yield f"- File: `{file.name}`, {in_bytes(file.size or file.roughly)}, {_proof(file)}; {urls}"
    if spec.mirror:
        commit = (
            f"commit `{spec.mirror.revision}`"
            if spec.mirror.revision
            else "the commit found first is recorded"
        )
        yield f"- Mirror: <https://huggingface.co/datasets/{spec.mirror.repo}>, {commit}"
    if spec.how_to_get:
        yield f"- By hand: {spec.how_to_get}"


def _proof(file: SourceFile) -> str:
    return ", ".join(f"{kind} `{value}`" for kind, value in file.checksums.items()) or "no published checksum"


def _size(spec: TaskSpec) -> str:
    if not spec.files:
        return "none"
    if spec.size:
        return in_bytes(spec.size)
    return f"about {in_bytes(sum(file.size or file.roughly or 0 for file in spec.files))}"


if __name__ == "__main__":
    print(markdown(), end="")
