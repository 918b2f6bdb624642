"""A whole small benchmark with the released code of VPT and with this one: time, memory, accuracy.

    git clone https://github.com/KMnP/vpt CODE
    python benchmarks/official.py --code CODE --python PYTHON

PYTHON has the packages of the released code (what is missing is named); it may have another version of
PyTorch. One task, one ViT with random weights, and VPT-deep: a grid of learning rate and weight decay on
train and val, the choice on val, three seeds, on both sides with the same images, weights, splits, grid,
epochs, batch, schedule, crops and flips. `tune_fgvc.py` makes the released code's grid in one process,
`train.py` its seeds in one process each; this code makes all by one call of `src/tune.py`. Then the parts of
the work are measured alone. `--folder` keeps what was written and measured, so that a second call goes on.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from official_data import ViT, write_task, write_weights
from official_driver import FEATURE
from visprompt.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "ViT-B_16-224.npz"  # what the released code calls the file of `FEATURE`
CODE = ("train.py", "tune_fgvc.py", "src/configs/vit_configs.py", "src/models/vit_prompt/vit.py")
PACKAGES = {  # module: package
    **{name: name for name in ("torch", "torchvision", "timm", "numpy", "scipy", "pandas", "fvcore")},
    **{name: name for name in ("iopath", "simplejson", "termcolor", "tabulate", "tqdm")},
    **{"sklearn": "scikit-learn", "ml_collections": "ml-collections"},
}
_ACCURACY = re.compile(r"Classification results with (val|test)_\S+ top1: ([\d.]+)")
_LACKING = (
    "import importlib.util, sys; print(*(m for m in sys.argv[1:] if importlib.util.find_spec(m) is None))"
)

Figures = dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """What a process took, with the processes that it ended.

    Attributes:
        wall: Seconds.
        cpu: Seconds of CPU time.
        mib: Peak resident memory of the largest of these processes, MiB.
    """

    wall: float
    cpu: float
    mib: float


def check_code(code: Path) -> None:
    """Raise an error unless a folder holds the released code of VPT.

    Raises:
        UserError: A file of it is missing.
    """
    if missing := [name for name in CODE if not (code / name).is_file()]:
        raise UserError(
            f"--code={code} is not the released code of VPT, it lacks {missing[0]}: "
            "give the folder of `git clone https://github.com/KMnP/vpt`"
        )


def check_python(python: str) -> None:
    """Raise an error unless a Python has the packages that the released code imports here.

    Raises:
        UserError: It cannot be started, or lacks packages, which the message names.
    """
    try:
        asked = subprocess.run(
            [python, "-c", _LACKING, *PACKAGES], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"--python={python} cannot be started as a Python: {error}") from error
    if missing := asked.stdout.split():
        names = " ".join(PACKAGES[name] for name in missing)
        raise UserError(f"--python={python} lacks packages of the released code: install them there, {names}")


def accuracies(log: str) -> dict[str, list[float]]:
    """Return the accuracies in percent, by split and epoch, of a log that the released code wrote."""
    found: dict[str, list[float]] = {"val": [], "test": []}
    for split, value in _ACCURACY.findall(log):
        found[split].append(float(value))
    return found


def chosen(points: Sequence[Figures]) -> Figures:
    """Return the point with the highest accuracy on val after the last epoch; the lower rate of equal ones.

    That is how `find_best_lrwd` of the released code's tune_vtab.py chooses; tune_fgvc.py has no choice.
    """
    return max(points, key=lambda point: (point["val"], -point["lr"]))


def launch(command: Sequence[str], log: Path, env: Mapping[str, str]) -> Usage:
    """Run a command, and return what it took.

    Raises:
        UserError: It failed; the message has the last line that it printed.
    """
    began = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | dict(env), cwd=log.parent
        )
        _, status, usage = os.wait4(process.pid, 0)  # of the process and the processes that it waited for
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"{Path(command[1]).name} ended with code {process.returncode}, see {log}: {last}")
    return Usage(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


@dataclass(frozen=True)
class Comparison:
    """The settings of a comparison, and the folder in which it takes place."""

    folder: Path
    options: argparse.Namespace
    vit: ViT

    @property
    def env(self) -> dict[str, str]:
        """Variables for the processes of both sides."""
        caches = {"VISPROMPT_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        return {"OMP_NUM_THREADS": str(self.options.threads), **caches}

    @property
    def points(self) -> list[tuple[float, float]]:
        """Base learning rate and weight decay of each point of the grid."""
        return [(lr, decay) for lr in self.options.rates for decay in self.options.decays]

    def step(self, name: str, action: Callable[[], Any]) -> Any:
        """Return what an action returns, or returned in an earlier call with this folder."""
        file = self.folder / f"{name}.json"
        if not file.is_file():
            print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
            content = json.dumps(action())
            file.write_text(content)
        return json.loads(file.read_text())

    def write(self) -> bool:
        """Write the task and the weights."""
        sizes = {name: getattr(self.options, name) for name in ("train", "val", "test")}
        write_task(self.folder, sizes, self.options.classes)
        write_weights(self.folder / "weights" / WEIGHTS, self.vit)
        return True

    def official_words(self, output: str) -> list[str]:
        """Return settings of the released code, without learning rate, weight decay and seed."""
        options = self.options
        words: dict[str, object] = {
            **{"MODEL.TYPE": "vit", "MODEL.TRANSFER_TYPE": "prompt", "MODEL.PROMPT.DEEP": True},
            **{"MODEL.PROMPT.NUM_TOKENS": options.prompts, "MODEL.PROMPT.DROPOUT": options.dropout},
            **{"MODEL.MODEL_ROOT": self.folder / "weights", "DATA.FEATURE": FEATURE, "DATA.NAME": "CUB"},
            **{"DATA.DATAPATH": self.folder / "official", "DATA.NUMBER_CLASSES": options.classes},
            **{"DATA.BATCH_SIZE": options.batch, "DATA.NUM_WORKERS": options.workers},
            **{"DATA.PIN_MEMORY": False, "SOLVER.TOTAL_EPOCH": options.epochs},
            **{"SOLVER.WARMUP_EPOCH": options.warmup, "OUTPUT_DIR": self.folder / output},
        }
        return [str(word) for pair in words.items() for word in pair]

    def official(self, name: str, words: Sequence[str], **what: Any) -> Figures:
        """Run the released code once, and return what its process took and what its driver measured."""
        result, spec = self.folder / f"{name}.result", self.folder / f"{name}.spec"
        output = words[words.index("OUTPUT_DIR") + 1]
        shutil.rmtree(output, ignore_errors=True)  # of a call that was ended; it refuses to run twice
        given = {"code": str(self.options.code.resolve()), "vit": self.vit.as_dict(), "words": list(words)}
        spec.write_text(json.dumps(given | {"result": str(result)} | what))
        driver = str(ROOT / "benchmarks" / "official_driver.py")
        usage = launch([self.options.python, driver, str(spec)], self.folder / f"{name}.log", self.env)
        runs = json.loads(result.read_text())
        for run in runs:
            if "folder" in run:
                log = accuracies(Path(run["folder"], "logs.txt").read_text())
                run |= {split: values[-1] for split, values in log.items() if values}
        return {"usage": vars(usage), "runs": runs}

    def official_grid(self) -> Figures:
        """Run the released code's grid."""
        return self.official("grid", self.official_words("grid"), points=self.points)

    def official_seed(self, seed: int, point: Figures) -> Figures:
        """Run the released code with the chosen point and a seed, in a new process."""
        rate = point["lr"] * self.options.batch / 256  # its tune_fgvc.py scales rates, its train.py does not
        words = ["SOLVER.BASE_LR", str(rate), "SOLVER.WEIGHT_DECAY", str(point["weight_decay"])]
        output = self.official_words(f"seed{seed}")
        return self.official(f"seed{seed}", [*output, *words, "SEED", str(seed)], final=True)

    def our_words(self, logs: str = "logs") -> list[str]:
        """Return settings of this code, without the grid and the seeds."""
        options, vit = self.options, self.vit
        kwargs = {"embed_dim": vit.width, "depth": vit.blocks, "num_heads": vit.heads}
        kwargs |= {"patch_size": vit.patch, "mlp_ratio": vit.mlp / vit.width}
        words: dict[str, object] = {
            **{"data": "folder", "data.root": self.folder / "ours", "data.name": "official"},
            **{"data.interpolation": "bilinear", "data.resampling": "pillow"},
            **{"data.normalisation": "imagenet", "data.store_dir": self.folder / "stores"},
            **{"backbone": "timm", "backbone.name": "vit_tiny_patch16_224"},
            **{"backbone.weights": self.folder / "weights" / WEIGHTS},
            "++backbone.kwargs": "{" + ",".join(f"{key}:{value}" for key, value in kwargs.items()) + "}",
            **{"method": "vpt_deep", "method.num_tokens": options.prompts},
            **{"method.dropout": options.dropout, "recipe.optimizer": "sgd", "recipe.head_lr": "null"},
            **{"recipe.schedule": "per_epoch", "recipe.head_init": "vpt"},
            **{"recipe.batch_size": options.batch, "recipe.epochs": options.epochs},
            **{"recipe.warmup_epochs": options.warmup, "trainer": "cpu", "callbacks": "none"},
            "paths.log_dir": self.folder / logs,
        }
        return [f"{key}={value}" for key, value in words.items()]

    def ours(self) -> Figures:
        """Run grid, choice and seeds with this code; what is finished is only read."""
        grid = {"recipe.lr": self.options.rates, "recipe.weight_decay": self.options.decays}
        axes = ",".join(f"{key}:{values}".replace(" ", "") for key, values in grid.items())
        seeds = ",".join(map(str, self.options.seeds))
        words = [*self.our_words(), f"++recipe.grid={{{axes}}}", f"seeds=[{seeds}]", "table=null"]
        command = [sys.executable, str(ROOT / "src" / "tune.py"), *words]
        return vars(launch(command, self.folder / "ours.log", self.env))


def measure(comparison: Comparison) -> Figures:
    """Make all runs of both sides, then measure the parts; return all figures."""
    import official_parts

    options, step = comparison.options, comparison.step
    step("settings", lambda: settings_of(options))
    if step("settings", dict) != settings_of(options):
        raise UserError(f"--folder={comparison.folder} holds a comparison with other settings: give another")
    step("data", comparison.write)
    grid = step("grid", comparison.official_grid)
    point = chosen(grid["runs"])
    seeds = [
        step(f"seed{seed}", lambda seed=seed: comparison.official_seed(seed, point)) for seed in options.seeds
    ]
    figures = {"grid": grid, "seeds": seeds, "ours": step("ours", comparison.ours)}
    return figures | official_parts.measure(comparison)


def settings_of(options: argparse.Namespace) -> Figures:
    """Return the options that decide what is measured, as JSON holds them."""
    left_out = ("folder", "output", "python", "code")
    return {name: value for name, value in vars(options).items() if name not in left_out}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--code", type=Path, required=True, help="folder of github.com/KMnP/vpt")
    parser.add_argument("--python", required=True, help="a Python with the packages of that code")
    parser.add_argument("--folder", type=Path, help="keeps all files; without it they are deleted")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "official.md")
    for name, count in (("train", 800), ("val", 200), ("test", 5000), ("classes", 10)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1, help="epochs of warm-up, the first of which is at 0")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.25])
    parser.add_argument("--decays", type=float, nargs="+", default=[0.001, 0.0001])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 44, 82])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the released code's loader")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, on both sides")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the page and print it."""
    options = parse(arguments)
    check_code(options.code)
    check_python(options.python)
    import official_page

    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        comparison = Comparison(folder, options, ViT())
        text = official_page.page(comparison, measure(comparison))
    options.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
