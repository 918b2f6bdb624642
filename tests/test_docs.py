"""What the documents show is true to the code."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from visprompt import methods
from visprompt.backbones import BackboneSpec, build_backbone
from visprompt.classifier import Classifier
from visprompt.data import describe
from visprompt.data.catalog import TASKS
from visprompt.methods import describe as pairs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_walk_through_adding_a_method_works_as_written(monkeypatch):
    text = (ROOT / "docs" / "add-a-method.md").read_text()
    assert len(text.splitlines()) <= 80
    source = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    module = types.ModuleType("scaled")
    monkeypatch.setitem(sys.modules, "scaled", module)
    exec(source, module.__dict__)
    monkeypatch.setattr(methods, "METHODS", {**methods.METHODS, "scaled": module.Scaled})
    spec = BackboneSpec(pretrained=False, kwargs={"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 16})
    backbone = build_backbone(spec).module
    classifier = Classifier(backbone, methods.build_method("scaled", backbone, num_tokens=3), 4)
    assert set(classifier.tuned_state()) == {"prompts", "scale", "head.weight", "head.bias"}
    images = torch.randn(2, 3, 64, 64)
    with_prompts = classifier(images)
    with torch.no_grad():
        classifier.method.scale.fill_(0.0)
    assert not torch.allclose(classifier(images), with_prompts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_every_method_is_in_the_readme():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"\w+", row)} == set(methods.METHODS)


def test_the_page_of_datasets_is_made_of_the_catalog():
    page = (ROOT / "docs" / "datasets.md").read_text()
    assert page == describe.markdown(), "run make docs"
    for spec in TASKS.values():
        assert f"\n### {spec.id}\n" in page
        assert spec.licence in page
        assert all(file.name in page and file.sha256 in page and file.md5 in page for file in spec.files)


def test_the_page_of_methods_by_backbones_is_made_by_trying_them():
    assert (ROOT / "docs" / "methods-by-backbones.md").read_text() == pairs.markdown(), "run make docs"
