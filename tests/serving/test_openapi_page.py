"""The commands and the client that docs/serving.md and the README show, against a service that runs."""

import os
import re
import subprocess
import sys

import pytest

import visprompt
from helpers.cli import ROOT
from helpers.service import picture, running, write_state
from visprompt.models.backbones import DEMO
from visprompt.serving.limits import Limits

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "serving.md").read_text()
CURLS = re.findall(r"^curl .*", PAGE + (ROOT / "README.md").read_text(), re.M)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    write_state(folder / "birds.safetensors", 1, 4)
    write_state(folder / "digits.safetensors", 2, 10)
    beach = visprompt.build(DEMO, "linear", 3, kind="segmentation")
    names = ["sky", "sea", "sand"]
    visprompt.save(beach, folder / "beach.safetensors", class_names=names, task="beach")
    with running(tmp_path_factory.mktemp("service"), folder) as service:
        yield service


@pytest.fixture
def place(tmp_path):
    for number, name in enumerate(("a.jpg", "b.jpg")):
        (tmp_path / name).write_bytes(picture(number, kind="JPEG"))
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    return tmp_path


def test_every_command_is_answered(service, place):
    assert len(CURLS) > 20
    for line in CURLS:
        here = line.partition("  #")[0].replace("localhost:8000", service.url)
        done = subprocess.run(
            here.replace("curl ", "curl -sS --fail-with-body ", 1),
            shell=True,
            cwd=place,
            env=os.environ | {"VISPROMPT_ADMIN_TOKEN": "let-me-in"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (line, done.stdout, done.stderr)


def test_the_client_prints_the_label(service, place):
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    program = program.replace("localhost:8000", service.url.removeprefix("http://"))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "birds_" in done.stdout


def test_the_page_names_every_endpoint_limit_and_metric(service):
    assert set(re.findall(r"^\| `(\w+)` \| [\d]", PAGE, re.M)) == set(Limits.__dataclass_fields__)
    paths = {re.sub(r"\{task\}", "TASK", path) for path in service.get("/openapi.json").json()["paths"]}
    for path in paths:
        shown = path.replace("TASK", "birds")
        assert path in PAGE or f"localhost:8000{shown}" in PAGE or "versions" in path, path
    named = set(re.findall(r"^# TYPE (visprompt_\w+) ", service.get("/metrics").text, re.M))
    assert {name for name in named if name not in PAGE} == set()
