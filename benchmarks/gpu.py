"""What one GPU does, measured in under ten minutes: `make bench-gpu` writes benchmarks/gpu.md.

Parts, each of which may fail without the others:

- rate: the matrix rate of the device in bf16 and in float32 with and without TF32, measured;
- step: time and memory of a training step, exact, carried and promptless (`step_time.py`), under bf16
  autocast, and the share of the measured matrix rate that the exact step reaches;
- compiled: the same steps compiled, for the first backbone and batch and few lengths;
- task: a task of VTAB's size, 1,000 training and 1,000 test images, from the command line to its result;
- loader (`loading.py`), bank (`bank.py`), and the service: requests per second and their latency.

A part that has not begun after --minutes is left out, and the page says so.
"""

import argparse
import base64
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import bank
import loading
import step_time
from measuring import machine, milliseconds
from visprompt.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
COMPILED_LENGTHS = (10, 100)
SIDES = {"cuda": 8192, "cpu": 512}  # of the square matrices whose product is timed


def rates(options: argparse.Namespace) -> dict[str, float]:
    """Return measured matrix rates in TFLOP/s by name."""
    side, found = SIDES[options.device], {}
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("float32", torch.float32, False),
        ("float32 with TF32", torch.float32, True),
    ):
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        a, b = (torch.randn(side, side, device=options.device, dtype=dtype) for _ in range(2))
        times = [milliseconds(lambda a=a, b=b: a @ b, options.device) for _ in range(20)][5:]
        found[name] = 2 * side**3 / median(times) / 1e9
    torch.set_float32_matmul_precision("highest")
    return found


def rate_part(options: argparse.Namespace) -> str:
    rows = [[name, f"{rate:.3g}"] for name, rate in options.rates.items()]
    return table(["matrix product", "TFLOP/s"], rows)


def step_options(
    options: argparse.Namespace, backbone: str, batch: int, compiled: bool
) -> argparse.Namespace:
    return argparse.Namespace(
        **{"backbone": backbone, "device": options.device, "precision": options.precision},
        **{"batch": batch, "pairs": options.pairs, "compile": compiled},
    )


def counted(variant: step_time.Variant, given: argparse.Namespace) -> float:
    """Return TFLOP of a training step, matrix products and attention, by PyTorch's count."""
    step = step_time.make_step(variant, *step_time.make_vit(given), given)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 1e12


def step_part(options: argparse.Namespace) -> str:
    tables = []
    for backbone in options.backbones:
        for batch in options.batches:
            tables.append(f"{backbone}, batch {batch}, {options.precision}, {options.pairs} rounds")
            tables.append(measured(lambda b=backbone, n=batch: step_tables(options, b, n)))
    return "\n\n".join(tables)


def step_tables(options: argparse.Namespace, backbone: str, batch: int) -> str:
    given = step_options(options, backbone, batch, compiled=False)
    variants = [step_time.Variant(length) for length in options.lengths]
    times, memory = step_time.time_rows(variants, given), step_time.memory_rows(variants, given)
    rate = options.rates["bf16" if options.precision == "bf16" else "float32"]
    for variant, row in zip(variants, times, strict=True):
        share = counted(variant, given) / (float(row[1]) / 1000) / rate
        row.append(f"{100 * share:.0f} %")
    head = step_time.table("ms", []).splitlines()[0].strip("| ").split(" | ")
    return "\n\n".join(
        [table([*head, "exact's share of the matrix rate"], times), step_time.table("MiB", memory)]
    )


def measured(part: Callable[[], str]) -> str:
    """Return what a part gives, or why it could not be measured; free its memory on the GPU."""
    try:
        return part()
    except Exception as error:  # others may still be measured
        return f"Not measured: {' '.join(str(error).split())[:500] or type(error).__name__}"
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next part may be another process


def compiled_part(options: argparse.Namespace) -> str:
    given = step_options(options, options.backbones[0], options.batches[0], compiled=True)
    lengths = [length for length in options.lengths if length in COMPILED_LENGTHS] or options.lengths[:1]
    rows = step_time.time_rows([step_time.Variant(length) for length in lengths], given)
    return f"{given.backbone}, batch {given.batch}\n\n{step_time.table('ms', rows)}"


def write_images(root: Path, count: int, side: int) -> None:
    """Write random images of ten classes, each class with its own mean colour, in train, val and test."""
    draw = np.random.default_rng(0)
    colours = draw.integers(40, 216, (10, 3))
    for split, share in (("train", 0.8), ("val", 0.2), ("test", 1.0)):
        for i in range(round(share * count)):
            pixels = np.clip(colours[i % 10] + draw.normal(0, 30, (side, side, 3)), 0, 255).astype(np.uint8)
            file = root / split / f"class{i % 10}" / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file, quality=80)


def run(*arguments: str) -> float:
    """Run a command of this project and return its seconds.

    Raises:
        UserError: The command failed; the last line of what it said.
    """
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise UserError(f"{' '.join(arguments[:2])} failed: {said}")
    return time.perf_counter() - start


def task_part(options: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", options.images, 64)
        seconds = run(
            *("src/train.py", "data=folder", f"data.root={folder / 'images'}", "data.name=bench"),
            *(f"data.store_dir={folder / 'stores'}", f"paths.log_dir={folder / 'logs'}", "callbacks=none"),
            *("data.final=train+val", "method=vpt_deep", "backbone=timm", "backbone.pretrained=false"),
            *(f"backbone.name={options.backbones[0]}", f"trainer={options.trainer}"),
            *(f"precision={options.training_precision}", f"recipe.epochs={options.epochs}", "recipe.lr=0.1"),
        )
        (file,) = (folder / "logs").glob("bench/vpt_deep/*/result.json")
        result = json.loads(file.read_text())
    train, peak = result["time"]["train_s"], result["peak_memory"]
    rows = [
        ["whole command", f"{seconds:.1f} s"],
        ["training", f"{train:.1f} s"],
        ["one epoch", f"{train / options.epochs:.2f} s"],
        [f"peak memory ({peak['of']})", f"{peak['bytes'] / 2**20:,.0f} MiB"],
        ["device", result["machine"]["device"]],
    ]
    what = f"vpt_deep, {options.images:,} training and as many test images, {options.epochs} epochs"
    head = f"{options.backbones[0]}, {options.training_precision}, {what}"
    return f"{head}\n\n{table(['what', 'measured'], rows)}"


def loader_part(options: argparse.Namespace) -> str:
    return printed(loading.main, ["--images", str(4 * options.images), "--rounds", "3"])


def bank_part(options: argparse.Namespace) -> str:
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    given = ["--device", options.device, "--dtype", dtype, "--backbone", options.backbones[0]]
    tasks = ["--batch", str(options.batches[0]), "--tasks", "1", "16", "64", "--rounds", str(options.pairs)]
    return printed(bank.main, given + tasks)


def service_part(options: argparse.Namespace) -> str:
    """Tune the demo task for one epoch, serve it, and send it images from several threads."""
    with tempfile.TemporaryDirectory() as name:
        logs = Path(name)
        run(
            *("src/train.py", "data=demo/digits_loc", "recipe.epochs=1", f"paths.log_dir={logs}"),
            *("callbacks=none", f"trainer={options.trainer}"),
        )
        where = [f"states={logs}", "port=0", f"device={options.device}", f"paths.log_dir={logs}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        service = subprocess.Popen([sys.executable, "src/serve.py", *where], cwd=ROOT, **pipes)
        try:
            assert service.stdout is not None
            said = next((line for line in service.stdout if " on http://" in line), "")
            if not said:
                raise UserError("the service did not start")
            address = "http://" + said.partition(" on http://")[2].partition(",")[0]
            threading.Thread(target=service.stdout.read, daemon=True).start()
            with urllib.request.urlopen(f"{address}/v1/tasks", timeout=60) as answer:
                task = json.load(answer)[0]["name"]
            rows = [
                [str(threads), *asked(address, task, threads, options.requests)] for threads in (1, 8, 32)
            ]
        finally:
            service.terminate()
            service.wait(60)
    head = ["clients at once", "requests/s", "median ms", "slowest in a hundred, ms"]
    return f"the demo backbone, one task, {options.requests} requests of one image\n\n{table(head, rows)}"


def asked(address: str, task: str, threads: int, requests: int) -> list[str]:
    """Send requests from several threads; return requests per second and two latencies."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "png")
    body = json.dumps({"images": [base64.b64encode(file.getvalue()).decode()]}).encode()
    times: list[float] = []

    def ask() -> None:  # an error ends the thread, and its answers are missing below
        for _ in range(requests // threads):
            start = time.perf_counter()
            request = urllib.request.Request(
                f"{address}/v1/tasks/{task}/predict", body, {"Content-Type": "application/json"}
            )
            urllib.request.urlopen(request, timeout=60).read()
            times.append(time.perf_counter() - start)

    start = time.perf_counter()
    clients = [threading.Thread(target=ask) for _ in range(threads)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    if len(times) != requests // threads * threads:
        raise UserError(f"the service answered {len(times)} of {requests // threads * threads} requests")
    whole, ordered = time.perf_counter() - start, sorted(times)
    slow = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return [f"{len(times) / whole:.0f}", f"{1000 * median(times):.1f}", f"{1000 * slow:.1f}"]


def printed(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> str:
    """Return what another benchmark prints."""
    with redirect_stdout(io.StringIO()) as out:
        main(arguments)
    return out.getvalue().strip()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (head, ["---", *["---:"] * (len(head) - 1)], *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


PARTS: dict[str, tuple[str, Callable[[argparse.Namespace], str]]] = {
    "rate": ("Matrix rate", rate_part),
    "step": ("A training step", step_part),
    "task": ("A task of VTAB's size, end to end", task_part),
    "bank": ("The bank", bank_part),
    "service": ("The service", service_part),
    "loader": ("The loader", loader_part),
    "compiled": ("A compiled training step", compiled_part),
}


def page(options: argparse.Namespace) -> str:
    """Measure the parts and return the page."""
    begin = time.monotonic()
    options.rates = rates(options)
    text = f"# One GPU\n\nWritten by `make bench-gpu`. {machine()}\n"
    for name in options.parts:
        title, part = PARTS[name]
        print(f"{title} ...", file=sys.stderr)
        if time.monotonic() - begin > 60 * options.minutes:
            body = f"Not measured: {options.minutes} minutes were over."
        else:
            body = measured(partial(part, options))
        text += f"\n## {title}\n\n{body}\n"
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "gpu.md")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--backbones", nargs="+", default=["vit_base_patch16_224", "vit_large_patch16_224"])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 10, 50, 100, 200])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--requests", type=int, default=640)
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins later")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("make bench-gpu measures a GPU, and this machine has none that PyTorch can use")
    on_gpu = options.device == "cuda"  # bf16 is slower than float32 on most CPUs
    options.trainer = "gpu" if on_gpu else "cpu"
    options.precision, options.training_precision = ("bf16", "bf16-mixed") if on_gpu else ("fp32", "32-true")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all weights are random, or embedded
    text = page(options)
    options.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
