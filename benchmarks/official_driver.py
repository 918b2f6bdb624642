"""Run the released code of VPT (github.com/KMnP/vpt) for `official.py`, in a Python with its packages.

`PYTHON official_driver.py SPEC.json` makes the runs that the JSON file describes and writes what they took to
the file that it names. The released code is not changed on disk. In memory, and only as far as it would
otherwise not run on this machine or on this backbone:

- modules that it imports and does not use are replaced by empty ones (turtle), or by what replaced them
  (timm.models.layers.helpers);
- JSON files are read without the argument `encoding`, which Python 3.9 removed;
- without a GPU, the number of GPUs is one, because it requires one and divides the batch by it;
- an entry of its table of ViTs gets the widths of the small one, and the head the same width;
- its pauses of several seconds, which keep cluster jobs apart, are counted and not made.
"""

import json
import os
import resource
import sys
import time
import types
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

FEATURE = "sup_vitb16_224"  # the entry of its tables whose sizes and file of weights are the small ViT's
slept: list[float] = []


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has ended, such as loader workers."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def import_code(code: Path, vit: dict[str, int]) -> tuple[types.ModuleType, types.ModuleType]:
    """Import the released code with the changes that the top of this file lists.

    Args:
        code: Its folder.
        vit: Sizes of the ViT: width, mlp, heads, blocks, patch.

    Returns:
        Its modules `train` and `tune_fgvc`.
    """
    sys.path[0] = str(code)
    os.chdir(code)
    os.environ.setdefault("SLURMD_NODENAME", "localhost")  # which it reads and does not use here
    import torch
    from timm.layers import to_2tuple

    empty: Any = types.ModuleType("turtle")
    empty.forward = None
    sys.modules["turtle"] = empty
    helpers: Any = types.ModuleType("timm.models.layers.helpers")
    helpers.to_2tuple = to_2tuple
    sys.modules.setdefault("timm.models.layers.helpers", helpers)
    if not torch.cuda.is_available():
        torch.cuda.device_count, torch.cuda.is_available = lambda: 1, lambda: False

    import tune_fgvc
    from src.data.datasets import json_dataset
    from src.models import vit_models
    from src.models.vit_backbones.vit import CONFIGS

    import train

    json_dataset.read_json = lambda file: json.loads(Path(file).read_text())
    train.sleep = tune_fgvc.sleep = slept.append
    config = CONFIGS[FEATURE]
    config.hidden_size, config.patches.size = vit["width"], (vit["patch"], vit["patch"])
    config.transformer.mlp_dim, config.transformer.num_heads = vit["mlp"], vit["heads"]
    config.transformer.num_layers = vit["blocks"]
    build = vit_models.build_vit_sup_models
    vit_models.build_vit_sup_models = lambda *given: (build(*given)[0], vit["width"])
    return train, tune_fgvc


def measured(action: Callable[[], object]) -> dict[str, float]:
    """Run something, and return its wall time, CPU time and left-out pauses in seconds."""
    slept.clear()
    wall, cpu = time.perf_counter(), cpu_seconds()
    action()
    return {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu, "slept": float(sum(slept))}


def main() -> None:
    """Make the runs of a specification."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    train, tune_fgvc = import_code(Path(spec["code"]), spec["vit"])
    args = Namespace(config_file="configs/prompt/cub.yaml", opts=spec["words"], train_type="prompt")
    found: list[dict[str, Any]] = []
    for lr, decay in spec.get("points", []):  # as `prompt_main` of tune_fgvc.py does, with its own points

        def point(lr: float = lr, decay: float = decay) -> None:
            train.train(tune_fgvc.setup(args, lr, decay), args)

        found.append({"lr": lr, "weight_decay": decay, **measured(point), "folder": newest(args)})
    if spec.get("final"):
        found.append({**measured(lambda: train.main(args)), "folder": newest(args)})
    for _ in range(spec.get("loads", 0)):
        found.append(load(train, args))
    if "reference" in spec:
        write_reference(train, args, spec["reference"])
    Path(spec["result"]).write_text(json.dumps(found))


def newest(args: Namespace) -> str:
    """Return the folder of the run that ended last."""
    output = Path(args.opts[args.opts.index("OUTPUT_DIR") + 1])
    return str(max(output.rglob("logs.txt"), key=lambda log: log.stat().st_mtime_ns).parent)


def write_reference(train: Any, args: Namespace, file: str) -> None:
    """Write the first batch of val, its logits, and the initial prompts and head that give them."""
    import numpy as np
    import torch

    cfg = config_of(train, args)
    model = train.build_model(cfg)[0].eval()
    images = next(iter(train.data_loader.construct_val_loader(cfg)))["image"]
    with torch.no_grad():
        arrays = {"images": images, "logits": model(images.to(next(model.parameters()).device)).cpu()}
    tuned = {name: value.detach().cpu() for name, value in model.named_parameters() if value.requires_grad}
    np.savez(file, **{name: value.numpy() for name, value in (arrays | tuned).items()})


def config_of(train: Any, args: Namespace) -> Any:
    """Return the configuration of the released code."""
    cfg = train.get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    return cfg


def load(train: types.ModuleType, args: Namespace) -> dict[str, float]:
    """Load the training images once as an epoch does, and return what that took and how many they are."""
    cfg = config_of(train, args)
    loader = train.data_loader.construct_train_loader(cfg)
    images = 0

    def epoch() -> None:
        nonlocal images
        for batch in loader:
            images += len(batch["label"])

    return measured(epoch) | {"images": images}


if __name__ == "__main__":
    main()
