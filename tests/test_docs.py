"""What the documents show is true to the code."""

import re
from pathlib import Path

import pytest
from hydra import compose
from omegaconf import OmegaConf

from visprompt.data.catalog import TASKS, describe
from visprompt.models.methods import describe as pairs
from visprompt.runs import methods_page, result_page
from visprompt.runs.compose import composing

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / "notebooks").glob("*.md"),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


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


def test_the_page_of_methods_is_made_of_their_configs():
    assert (ROOT / "docs" / "methods.md").read_text() == methods_page.markdown(), "run make docs"
    for file in (ROOT / "configs" / "method").glob("*.yaml"):
        assert file.read_text().startswith("# "), f"{file.name}: the first line says what is tuned"


def test_the_page_of_results_is_made_of_their_schema():
    assert (ROOT / "docs" / "result.md").read_text() == result_page.markdown(), "run make docs"


@pytest.mark.parametrize(
    "script", ["train", "tune", "eval", "predict", "prepare", "report", "export", "serve"]
)
def test_help_says_where_the_keys_are_explained(script):
    with composing():
        shown = OmegaConf.to_container(compose(script, return_hydra_config=True).hydra.help, resolve=False)
    assert shown["header"].startswith(
        "What each key means: the comments of configs/${hydra.help.app_name}.yaml"
    )
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
