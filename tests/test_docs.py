"""What the documents show is true to the code."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose
from omegaconf import OmegaConf

from visprompt.data.catalog import TASKS, describe
from visprompt.models import methods
from visprompt.models.backbones import BackboneSpec, build_backbone
from visprompt.models.classifier import Classifier
from visprompt.models.methods import describe as pairs
from visprompt.runs.compose import composing

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / "notebooks").glob("*.md"),
]


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


def test_the_recipe_of_that_method_has_what_the_benchmarks_ask_for():
    text = (ROOT / "docs" / "add-a-method.md").read_text()
    config, recipe = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    base = yaml.safe_load((ROOT / "configs" / "recipe" / "base.yaml").read_text())
    read = {value[len("${row:") : -1] for value in map(str, [*base.values(), *config.values()]) if "${row:" in value}
    assert set(recipe["rows"]) == {"default", "vtab", "fgvc"}
    for row in recipe["rows"].values():
        assert set(row) == {*read, "grid", "source"}
    assert {recipe["rows"][name]["epochs"] for name in ("vtab", "fgvc")} == {100}


def test_the_page_of_fidelity_names_tests_that_there_are():
    page = (ROOT / "docs" / "fidelity.md").read_text()
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page))
    assert len(named) > 25
    assert {test for file, test in named if f"def {test}(" not in (ROOT / file).read_text()} == set()
    rows = [
        line
        for line in page.splitlines()
        if line.startswith("| ") and not line.startswith(("| :", "| what", "| paper"))
    ]
    assert [row for row in rows if "`tests/" not in row and "| none: " not in row] == []


def readme_rows():
    """The README's table of methods: their names and the options that are named for each of them."""
    cell = r"`\w+`(?:, `\w+`)*"
    for names, options in re.findall(
        rf"^\| ({cell}) \|[^|]*\|([^|]*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE
    ):
        found = re.findall(r"`(\w+)`", names)
        parts = options.split(";") if ";" in options else [options] * len(found)
        yield from zip(found, (set(re.findall(r"`(\w+)`", part)) for part in parts), strict=True)


def test_every_method_is_in_the_readme_with_options_that_it_has():
    rows = dict(readme_rows())
    assert set(rows) == set(methods.METHODS)
    assert sum(map(len, rows.values())) > 30
    for name, options in rows.items():
        config = yaml.safe_load((ROOT / "configs" / "method" / f"{name}.yaml").read_text())
        assert options <= config.keys() - {"name"}, name


@pytest.mark.parametrize("script", ["train", "tune", "eval", "predict", "prepare", "report"])
def test_help_says_where_the_keys_are_explained(script):
    with composing():
        shown = OmegaConf.to_container(compose(script, return_hydra_config=True).hydra.help, resolve=False)
    assert shown["header"].startswith("What each key means: the comments of configs/${hydra.help.app_name}.yaml")
    assert "${hydra.help.header}" in shown["template"]
    assert ("$APP_CONFIG_GROUPS" in shown["template"]) == (script in ("train", "tune"))
    assert "$CONFIG" in shown["template"]


def test_the_page_of_datasets_is_made_of_the_catalog():
    page = (ROOT / "docs" / "datasets.md").read_text()
    assert page == describe.markdown(), "run make docs"
    for spec in TASKS.values():
        assert f"\n### {spec.id}\n" in page
        assert spec.licence in page
        assert all(file.name in page and file.sha256 in page and file.md5 in page for file in spec.files)


@pytest.mark.slow
def test_the_page_of_methods_by_backbones_is_made_by_trying_them():
    assert (ROOT / "docs" / "methods-by-backbones.md").read_text() == pairs.markdown(), "run make docs"
