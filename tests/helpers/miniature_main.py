"""Runs an entry point on miniatures.

`python tests/helpers/miniature_main.py DATA_DIR SOURCE TASKS SCRIPT ARGUMENT...`.

The script is the user's own; only the records of the named tasks are those of the miniatures, which it writes
before.
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from helpers.miniatures import miniature  # noqa: E402
from visprompt.data import catalog  # noqa: E402  # the path comes first

if __name__ == "__main__":
    data_dir, source, tasks, script, *arguments = sys.argv[1:]
    for task in tasks.split(","):
        catalog.TASKS.update(miniature.write(task, source, Path(data_dir)))
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / "src" / script), run_name="__main__")
