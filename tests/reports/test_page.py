"""The page: what it says, that it is valid and accessible HTML which loads nothing, and how a browser shows it."""

import json
import re
import subprocess
import tempfile
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from helpers.browser import OPTIONS, browser
from helpers.written_runs import result, write
from visprompt.data.catalog import SUITES
from visprompt.reports import figures
from visprompt.reports.load import survey
from visprompt.reports.page import Picture, contents, page

MADE = datetime(2026, 11, 21, 20, 30, tzinfo=UTC)
ALL_TRIED = "All settings of a method on a task with final runs have a grid on the validation images among these runs."
VOID = {"meta", "img", "source", "br", "link", "input", "hr"}
HOSTILE = "<script>alert(1)</script> & \"cats\" 'n' dogs"


def write_runs(logs):
    """Four methods on the demo tasks with two seeds, a sweep of lengths, own images with a hostile name."""
    for place, task in enumerate(("digits", "digits_crowded", "digits_loc")):
        for number, method in enumerate(("linear", "full", "bias", "vpt_deep")):
            options = {"num_tokens": 10, "depth": None} if method == "vpt_deep" else {}
            for seed in (42, 44):
                score = 0.5 + 0.1 * number + 0.03 * place + seed / 10_000
                tuned = {"parameters": 10 ** (2 * number) * (number > 0)}
                folder = write(logs, result(task, method, score, seed=seed, options=options, tuned=tuned))
                epochs = "".join(f"{e},{2.0 - e / 10},{0.3 + e / 30}\n" for e in range(12))
                (folder / "metrics.csv").write_text(f"epoch,train/loss,train/acc\n{epochs}")
    for tokens in (1, 5, 10, 50):
        options = {"num_tokens": tokens, "depth": None}
        write(logs, result("digits", "vpt_deep", 0.4 + tokens / 200, split="tune", options=options))
    write(logs, result(HOSTILE.replace("/", ""), "linear", 0.5, versions={"git_commit": "abcdef012345+"}))
    (logs / "digits" / "ssf" / ("d" * 12) / "resume").mkdir(parents=True)
    return logs


def made_of(logs, **options):
    told = contents(survey([logs]), [logs], MADE, **options)
    plots = [plot for section in told.sections for plot in section.plots]
    drawn = {p.name: Picture(figures.svg(p, figures.LIGHT), figures.svg(p, figures.DARK)) for p in plots}
    return told, page(told, drawn)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return made_of(write_runs(tmp_path_factory.mktemp("logs")))


class Reader(HTMLParser):
    """Elements with their attributes, and whether all that was opened was closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def within(self, tag):
        return [text for name, text in self.texts if name == tag]


def test_the_page_is_well_formed_and_its_headings_are_in_order(report):
    read = Reader(report[1])
    assert report[1].startswith("<!DOCTYPE html>\n")
    assert read.all("html") == [{"lang": "en"}]
    levels = [int(name[1]) for name, _, _ in read.elements if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    names = [attributes["id"] for _, attributes, _ in read.elements if "id" in attributes]
    assert len(set(names)) == len(names)
    links = [attributes["href"] for attributes in read.all("a")]
    assert links[0] == "#summary"
    assert {link.removeprefix("#") for link in links} == set(names)


def test_tables_and_figures_can_be_read_without_seeing_them(report):
    told, text = report
    read = Reader(text)
    count = sum(len(section.tables) for section in told.sections)
    assert len(read.all("table")) == len(read.all("caption")) == count > 8
    assert all(attributes.get("scope") in ("col", "row") for attributes in read.all("th"))
    boxes = [attributes for attributes in read.all("div") if "scroll" in attributes.get("class", "")]
    assert len(boxes) == count
    assert all(box["role"] == "region" and box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    images = read.all("img")
    plots = [plot for section in told.sections for plot in section.plots]
    assert [image["alt"] for image in images] == [plot.alt for plot in plots]
    assert all(int(image["width"]) == 480 and int(image["height"]) > 250 for image in images)


def test_the_page_loads_nothing_and_runs_nothing(report):
    read = Reader(report[1])
    assert not {name for name, _, _ in read.elements} & {"script", "link", "iframe", "object", "base"}
    policy = next(a["content"] for a in read.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    found = [
        a[key] for _, a, _ in read.elements for key in ("src", "srcset", "href", "data", "action") if key in a
    ]
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in found)
    assert "url(" not in report[1]
    assert not [key for _, attributes, _ in read.elements for key in attributes if key.startswith("on")]


def test_what_runs_are_called_is_text_and_never_markup(report):
    name = HOSTILE.replace("/", "")
    assert name in "".join(Reader(report[1]).within("td") + Reader(report[1]).within("th"))
    assert "<script>" not in report[1]


def test_the_summary_says_what_was_run_and_on_what(report):
    told = {term: "\n".join(entries) for term, entries in report[0].facts}
    assert told["Tasks"] == f"4: digits, digits_crowded, digits_loc, {HOSTILE.replace('/', '')}"
    assert told["Methods"] == "4: linear, full, bias, vpt_deep"
    assert told["Seeds"] == "2: 42, 44"
    assert told["Runs"].startswith("29: 25 of split=final, 4 of split=tune")
    assert "1 folder is left out" in told["Runs"]
    assert "demo: source raw, form lossless, 224 pixels" in told["Data"]
    assert (
        "Settings of a method on a task with final runs: 13; with a grid on the validation images"
        in told["Protocol"]
    )
    assert "among these runs: 1;" in told["Protocol"]
    assert not any("ighest" in term for term in told), "no rule chooses by the test accuracy"
    assert told["Machines"] == "NVIDIA H200 (29 runs)"
    assert "0123456789ab (28 runs)\nabcdef012345+ (1 run)\n+: with changes" in told["Commits"]
    assert told["Made"] == "2026-11-21 20:30 UTC"


def test_sections_hold_the_tables_and_figures_that_the_runs_have(report):
    found = {section.name: section for section in report[0].sections}
    assert list(found) == ["accuracy", "cost", "tests", "choices", "parameters", "settings", "training"]
    assert list(found["accuracy"].tables) == ["accuracy_demo", "accuracy_own_images", "means", "wins"]
    assert list(found["tests"].tables) == ["tests", "ranks"]
    assert found["tests"].tables["tests"].title == "Against full"
    assert list(found["choices"].tables) == ["choices", "left_out"]
    assert [plot.name for plot in found["parameters"].plots] == [
        "accuracy_by_parameters_mean_of_3_tasks_demo"
    ]
    assert [plot.name for plot in found["settings"].plots] == ["accuracy_by_prompt_length_digits_validation"]
    assert len(found["training"].plots) == 6
    assert "0.25" in "".join(Reader(report[1]).within("li")), "three tasks cannot go below 0.25"


def test_many_figures_of_one_kind_are_folded(tmp_path):
    for task in ("digits", "digits_crowded", "digits_loc", "cifar", "svhn", "dtd", "eurosat"):
        folder = write(tmp_path, result(task))
        (folder / "metrics.csv").write_text("epoch,train/loss,train/acc\n0,2,0.2\n1,1,0.4\n")
    told, text = made_of(tmp_path)
    assert told.sections[-1].folded
    read = Reader(text)
    assert read.within("summary") == ["14 figures"]
    assert all("details" in around for name, _, around in read.elements if name == "img")


def test_only_tried_runs_make_a_page_without_test_scores(tmp_path):
    write(tmp_path, result(split="tune"))
    told, text = made_of(tmp_path)
    assert [list(section.tables) for section in told.sections] == [["choices"]]
    Reader(text)


# in a browser


def look(folder, width, scheme, *options):
    """Opens index.html of a folder in a frame of a width, headless.

    Returns what the browser printed and logged.
    """
    (folder / f"frame{width}.html").write_text(
        '<!DOCTYPE html><meta name="color-scheme" content="light dark"><title>none</title>'
        "<script>addEventListener('message', event => document.title = event.data)</script>"
        f'<body style="margin:0"><iframe src="index.html" style="border:0;width:{width}px;height:3000px"></iframe>'
    )
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                *(browser(), *OPTIONS, f"--user-data-dir={profile}"),
                *("--enable-logging=stderr", f"--window-size={max(width, 500)},3000"),
                f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
                *options,
                (folder / f"frame{width}.html").as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return done


PROBE = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
  width: innerWidth, scroll: document.documentElement.scrollWidth, body: document.body.scrollWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  paper: getComputedStyle(document.body).backgroundColor,
  drawn: [...document.images].every(image => image.complete && image.naturalWidth > 0),
  images: document.images.length,
  dark_images: [...document.images].every(image => image.currentSrc !== image.src),
  loaded: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
  wide: [...document.querySelectorAll(".scroll")].some(box => box.scrollWidth > box.clientWidth),
}), "*"))</script></body>"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_page_from_disk(report, tmp_path, width, scheme):
    _, text = report
    (tmp_path / "index.html").write_text(text)
    shot = tmp_path / "shot.png"
    done = look(tmp_path, width, scheme, f"--screenshot={shot}")
    assert "CONSOLE" not in done.stderr
    image = Image.open(shot).convert("RGB")
    assert image.getpixel((4, 4)) == ((21, 24, 28) if scheme == "dark" else (255, 255, 255))
    assert len(image.getcolors(1 << 20)) > 100, "there is text, and more"

    open_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    (tmp_path / "index.html").write_text(open_policy.replace("</body>", PROBE))
    done = look(tmp_path, width, scheme, "--dump-dom", "--virtual-time-budget=5000")
    assert "CONSOLE" not in done.stderr
    seen = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    assert seen["width"] == width
    assert max(seen["scroll"], seen["body"]) <= width, "the page itself does not scroll sideways"
    assert seen["wide"] or width > 400, "wide tables scroll in boxes of their own"
    assert (seen["dark"], seen["dark_images"]) == (scheme == "dark", scheme == "dark")
    assert seen["drawn"]
    assert seen["images"] == 8
    assert seen["loaded"] == []


def test_without_a_browser_the_test_says_how_to_get_one(monkeypatch):
    monkeypatch.setenv("PATH", str(Path("/nowhere")))
    monkeypatch.delenv("VISPROMPT_NO_BROWSER", raising=False)
    with pytest.raises(AssertionError, match="apt-get install chromium"):
        browser()


# beyond its tables: what was tried, which rows are missing, what figures are called


def told(logs):
    return contents(survey([logs]), [logs], MADE)


def protocol(logs):
    return dict(told(logs).facts)["Protocol"][1]


def tried(logs, *rates, **changes):
    for lr in rates:
        write(logs, result(split="tune", recipe={"lr": lr}, **changes))


def test_a_grid_is_one_of_the_same_protocol_with_two_points(tmp_path):
    few = "Settings of a method on a task with final runs: {}; with a grid on the validation images among these runs: {};"
    write(tmp_path, result())
    tried(tmp_path, 1.0, 5.0, precision="bf16-mixed")
    tried(tmp_path, 1.0)
    tried(tmp_path, 1.0, seed=44)  # another seed is no other point
    assert protocol(tmp_path).startswith(few.format(1, 0))
    tried(tmp_path, 5.0)
    assert protocol(tmp_path) == ALL_TRIED
    write(tmp_path, result(data={"fraction": 0.1}))
    assert protocol(tmp_path).startswith(few.format(2, 1))


def test_a_prune_grid_is_no_grid_of_settings(tmp_path):
    for number, split in enumerate(("tune", "tune", "final")):
        options = {"prune": True, "initial": "a", "token_mask": [number]}
        write(tmp_path, result(method="e2vpt", split=split, options=options, tuned={"kept_tokens": number}))
    assert "runs: 1; with a grid on the validation images among these runs: 0;" in protocol(tmp_path)


def test_a_row_that_no_full_row_is_under_one_protocol_with_is_shown_to_lack_it(tmp_path):
    for task in SUITES["demo"]:
        for method in ("linear", "full"):
            write(tmp_path, result(task, method))
    write(tmp_path, result("digits", "bias", precision="bf16-mixed"))
    (accuracy, *_) = told(tmp_path).sections
    assert [(row[0], str(row[1])) for row in accuracy.tables["wins"].rows] == [
        ("linear, precision 32-true", "0 of 3"),
        ("bias, precision bf16-mixed", "no full row of the same protocol"),
    ]


def test_no_two_figures_share_a_file(tmp_path):
    for task in ("2", "\u72ac", "\u732b", "dark"):
        folder = write(tmp_path, result(task))
        (folder / "metrics.csv").write_text("epoch,train/loss,train/acc\n0,2,0.2\n1,1,0.4\n")
    names = [plot.name for section in told(tmp_path).sections for plot in section.plots]
    files = [f"{name}{ending}" for name in names for ending in (".svg", "_dark.svg")]
    assert len(names) == 8
    assert len(set(files)) == 16
