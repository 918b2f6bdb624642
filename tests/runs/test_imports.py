"""What a command imports before it does something."""

import json
import subprocess
import sys

import pytest

from helpers.cli import ROOT

# of the modules that are loaded, the first names that torch, lightning.pytorch and timm do not load themselves
_ADDED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import train
early = "torch" in sys.modules
import torch, lightning.pytorch, timm
before = set(sys.modules)
from visprompt.runs import run_all
from visprompt.tuning import dry_run
added = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([early, sorted(added), sorted(name.partition(".")[0] for name in sys.modules)]))
"""


@pytest.mark.slow
def test_a_run_imports_little_besides_torch_lightning_and_timm():
    done = subprocess.run(
        [sys.executable, "-c", _ADDED, str(ROOT / "src")], capture_output=True, text=True, check=True
    )
    early, added, loaded = json.loads(done.stdout)
    assert not early, "words are checked before torch is loaded"
    assert set(added) <= {"visprompt", "filelock"} | set(sys.stdlib_module_names)
    late = {"sklearn", "pandas", "datasets", "cv2", "transformers", "onnx", "ray", "submitit", "fastapi"}
    assert not late.intersection(loaded), "these are loaded when they are used"
