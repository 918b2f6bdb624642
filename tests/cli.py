"""The entry points as a user calls them, on a network so small that a run takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "trainer=cpu",
    "backbone.pretrained=false",
    "++backbone.kwargs={embed_dim:24,depth:2,num_heads:2,patch_size:16}",
    "recipe.epochs=3",
    "recipe.warmup_epochs=1",
)


def command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "src" / f"{script}.py"), *arguments]


def call(script: str, *arguments: str, timeout: float = 200, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `python src/<script>.py ...` and returns what it printed."""
    return subprocess.run(
        command(script, *arguments), env=os.environ | env, capture_output=True, text=True, timeout=timeout, check=False
    )


def tiny(log_dir: Path, *arguments: str) -> tuple[str, ...]:
    """Arguments of a tiny run whose results go to a folder."""
    return (*TINY, f"paths.log_dir={log_dir}", *arguments)
