"""Golden values of every method: names and shapes of what it saves, and the hash of its run on the demo.

`make docs` runs this file, which adds the values of methods that have none yet and changes no other.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from helpers.tiny import tiny_classifier, tiny_model  # noqa: E402  # the path comes first
from visprompt.models.methods import METHODS  # noqa: E402
from visprompt.runs import run  # noqa: E402
from visprompt.runs.compose import composing, job  # noqa: E402
from visprompt.runs.identity import digest, identity_of  # noqa: E402
from visprompt.runs.job import Job  # noqa: E402

SHAPES = ROOT / "tests" / "golden" / "tuned_shapes.json"
IDENTITIES = ROOT / "tests" / "golden" / "identities.json"


def shapes(method):
    """Names and shapes of what a method saves on a tiny ViT, without what it tunes of the backbone itself."""
    state = tiny_classifier(method, model=tiny_model()).tuned_state()
    return {name: list(tensor.shape) for name, tensor in state.items() if not name.startswith("backbone.")}


def demo_run(method):
    """The words of the command line whose hash is kept for every method."""
    return ("data=demo/digits", f"method={method}")


def identity(words):
    """The hash of a job on a backbone that is not there, and on data that are not there unless they are the demo's."""
    with composing():
        cfg = job("train", words)
    assert Job.from_yaml(cfg.as_yaml()) == cfg, "what a rank reads is the same job"
    spec = {"name": cfg.backbone.name, "sha256": "0" * 64}
    blocks = SimpleNamespace(num_blocks=12)
    backbone = SimpleNamespace(
        image_size=224, mean=(0.5,) * 3, std=(0.5,) * 3, record=lambda: spec, module=blocks
    )
    return digest(identity_of(cfg, backbone, run.build_data(cfg, backbone)))


def write(file, values):
    """One line for each key."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def add_new():
    """Add what is missing."""
    kept, hashes = json.loads(SHAPES.read_text()), json.loads(IDENTITIES.read_text())
    write(SHAPES, kept | {method: shapes(method) for method in METHODS if method not in kept})
    runs = {" ".join(words): words for words in map(demo_run, METHODS)}
    write(IDENTITIES, hashes | {name: identity(words) for name, words in runs.items() if name not in hashes})


if __name__ == "__main__":
    add_new()
