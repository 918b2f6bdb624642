"""Start src/serve.py as a separate process, and make tuned states on the demo backbone for it."""

import http.client
import io
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import requests
import torch
from PIL import Image

import visprompt
from helpers.cli import command
from visprompt.data.sources.decoders import decoder_of
from visprompt.data.transforms import to_input
from visprompt.models.backbones import DEMO
from visprompt.models.tuned_state import load_state

BAD = b"this is not an image"
ADMIN = {"Authorization": "Bearer let-me-in"}


def write_state(path: Path, seed: int, classes: int, prefix: str = "", method: str = "vpt_deep") -> Path:
    """Writes a tuned state whose random prompts and head give clear, different answers."""
    torch.manual_seed(seed)
    classifier = visprompt.build(
        DEMO, method, classes, **({} if method == "linear" else {"num_tokens": 2 + classes})
    )
    with torch.no_grad():
        for _, parameter in classifier.tuned_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    names = [f"{prefix or path.stem}_{i}" for i in range(classes)]
    visprompt.save(classifier, path, class_names=names, task=path.stem)
    return path


def picture(seed: int, side: int = 70, kind: str = "PNG") -> bytes:
    """An encoded image of large coloured squares."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(colours).resize((side, side - 6), Image.Resampling.NEAREST).save(out, kind)
    return out.getvalue()


def expected(path: Path, pictures: list[bytes]) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes of a state, and the probabilities [n, classes] of its own classifier."""
    state, classifier = load_state(path), visprompt.load(path)
    decode = decoder_of(state.preprocessing)
    inputs = torch.stack([to_input(decode(content), state.preprocessing) for content in pictures])
    with torch.inference_mode():
        return state.class_names, classifier(inputs).softmax(1).numpy()


@dataclass
class Running:
    """A service that runs."""

    process: subprocess.Popen
    url: str
    log: Path
    asked: int = 0  # requests that were answered, but for those of `Client`

    def get(self, path: str, **given: Any) -> requests.Response:
        self.asked += 1
        return requests.get(self.url + path, timeout=60, **given)

    def post(self, path: str, **given: Any) -> requests.Response:
        self.asked += 1
        return requests.post(self.url + path, timeout=60, **given)

    def predict(self, task: str, *pictures: bytes, top_k: int = 1) -> requests.Response:
        files = [("image", (f"{i}.png", content)) for i, content in enumerate(pictures)]
        return self.post(f"/v1/tasks/{task}/predict", files=files, data={"top_k": top_k})

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Ends it with a signal, and returns its exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout)


class Client:
    """One connection to a service, which is kept open between requests or not."""

    def __init__(self, service: Running, keep: bool = True) -> None:
        self._address = urlsplit(service.url).netloc
        self._keep = keep
        self._connection: http.client.HTTPConnection | None = None

    def predict(self, task: str, content: bytes) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Returns status, answer and headers; raises OSError or HTTPException if no whole answer came."""
        if self._connection is None or not self._keep:
            self.close()
            self._connection = http.client.HTTPConnection(self._address, timeout=60)
        head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        body = head + content + b"\r\n--b--\r\n"
        self._connection.request("POST", f"/v1/tasks/{task}/predict", body, headers)
        answer = self._connection.getresponse()
        return answer.status, json.loads(answer.read()), dict(answer.headers)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


def until(true: Any, seconds: float = 30) -> None:
    """Waits until something is true, with a deadline."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not true after {seconds} seconds"
        time.sleep(0.05)


@contextmanager
def running(folder: Path, states: Any, *arguments: str, **env: str) -> Iterator[Running]:
    """Starts the service on a free port, waits until it is ready, and kills its process group at the end.

    The system chooses the port, and the service logs it: a port chosen here could be taken meanwhile.
    """
    log = folder / "service.log"
    words = (
        f"states={states}",
        "port=0",
        "watch_seconds=0.2",
        f"paths.log_dir={folder / 'logs'}",
        *arguments,
    )
    given = {"VISPROMPT_ADMIN_TOKEN": "let-me-in"} | env
    with log.open("w") as output:
        process = subprocess.Popen(
            command("serve", *words),
            env={k: v for k, v in (os.environ | given).items() if v},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        found: list[str] = []

        def listens() -> bool:
            assert process.poll() is None, log.read_text()
            found[:] = re.findall(r"tasks on (http://[\d.:]+),", log.read_text())
            return bool(found)

        until(listens, 120)
        service = Running(process, found[0], log)
        until(lambda: service.get("/health/ready").ok)
        yield service
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
