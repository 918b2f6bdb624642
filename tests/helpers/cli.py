"""The entry points as a user calls them, on a network so small that a run takes seconds."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NET = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 16}
TINY = (
    "trainer=cpu",
    "data=demo/digits",
    "seed=0",
    f"++backbone.kwargs={{{','.join(f'{key}:{value}' for key, value in NET.items())}}}",
    "method.num_tokens=4",
    "recipe.epochs=3",
    "recipe.warmup_epochs=1",
    "resume_every_n_epochs=1",  # by time, a tiny run would write no state but the last
)


# a frozen backbone is in evaluation mode on purpose; outside of tests the package itself keeps this quiet
frozen = pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")


def command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "src" / f"{script}.py"), *arguments]


def call(script: str, *arguments: str, timeout: float = 200, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `python src/<script>.py ...` and returns what it printed."""
    return subprocess.run(
        command(script, *arguments),
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


_ONE_AFTER_OTHER = """
import json, runpy, sys
for script, arguments in json.load(sys.stdin):
    print("#", script, *arguments, file=sys.stderr, flush=True)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
"""


def call_all(lines: Iterable[tuple[str, Sequence[str]]]) -> subprocess.CompletedProcess[str]:
    """Runs entry points one after the other in one new process, which imports torch only once.

    It ends at the first that fails; the last line of stderr that begins with "#" names it.
    """
    given = json.dumps([(str(ROOT / "src" / f"{script}.py"), list(words)) for script, words in lines])
    return subprocess.run(
        [sys.executable, "-c", _ONE_AFTER_OTHER],
        input=given,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def tiny(log_dir: Path, *arguments: str) -> tuple[str, ...]:
    """Arguments of a tiny run whose results go to a folder.

    Data or methods that are named replace those of TINY.
    """
    given = {argument.lstrip("+").partition("=")[0]: argument.partition("=")[2] for argument in arguments}
    options = list(TINY)
    if given.keys() & {"data", "tasks", "experiment"}:
        options.remove("data=demo/digits")
    if "methods" in given or not given.get("method", "vpt_deep").startswith("vpt"):
        options.remove("method.num_tokens=4")
    return (*options, f"backbone.weights={weights(log_dir)}", f"paths.log_dir={log_dir}", *arguments)


def weights(folder: Path) -> Path:
    """Weights of the tiny network, so large that its random features tell the digits apart."""
    import torch
    from safetensors.torch import save_file

    path = folder / "weights.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        noise = torch.Generator().manual_seed(0)
        save_file(
            {name: start + 0.2 * torch.randn(start.shape, generator=noise) for name, start in _start()}, path
        )
    return path


@lru_cache
def _start() -> list[tuple[str, Any]]:
    """Names of the tiny network's parameters, with ones where a norm multiplies and zeros elsewhere."""
    import torch

    from visprompt.models.backbones import BackboneSpec, build_backbone

    model = build_backbone(BackboneSpec(pretrained=False, kwargs=NET)).module.model
    ones = [name for name, _ in model.named_parameters() if "norm" in name and name.endswith("weight")]
    return [
        (n, torch.ones(p.shape) if n in ones else torch.zeros(p.shape)) for n, p in model.named_parameters()
    ]


@contextmanager
def composed(config_name: str, *arguments: str) -> Iterator[Any]:
    """What `@hydra.main` hands to an entry point, in this process, with what Hydra knows while it runs."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    from visprompt.runs.compose import composing

    with composing():
        cfg = compose(config_name, list(arguments), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg.hydra
        try:
            yield cfg
        finally:
            HydraConfig.instance().cfg = None


def tiny_job(log_dir: Path, *arguments: str) -> Any:
    """The composed job of a tiny run without a progress bar."""
    from visprompt.runs.compose import composing, job

    with composing():
        return job("train", tiny(log_dir, "callbacks=none", *arguments))


def tiny_run(log_dir: Path, *arguments: str) -> Any:
    """A tiny run, prepared and not begun."""
    from visprompt.runs import run

    return run.prepare(tiny_job(log_dir, *arguments))


def leaves(cfg: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a config, those of its groups before what is in them."""
    from omegaconf import OmegaConf

    for key in map(str, cfg):
        node = cfg._get_node(key)
        yield f"{prefix}{key}"
        if OmegaConf.is_dict(node) and not node._is_missing() and not node._is_none():
            yield from leaves(node, f"{prefix}{key}.")


def content(folder: Path) -> dict[str, str]:
    """Hashes of all files below a folder, by path, but for the lock and leases."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock" and not path.name.startswith("lease-")
    ]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tensors(folder: Path) -> dict[str, Any]:
    """The tensors of a run's tuned state."""
    from visprompt.models.tuned_state import load_state

    return dict(load_state(folder).tensors)


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two sets of tensors are equal bit by bit."""
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
