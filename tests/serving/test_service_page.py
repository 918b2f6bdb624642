"""The page at / in a browser: the real service behind it, in light and dark, wide and on a phone, by keyboard."""

import re

import pytest
import torch

import visprompt
from helpers.browser import tab as new_tab
from helpers.service import BAD, expected, picture, running, write_state
from visprompt.models.backbones import DEMO
from visprompt.serving.access import USE
from visprompt.serving.page import _PAGE as TEXT
from visprompt.serving.page import HEADERS

HOSTILE = "<img src=x onerror=alert(1)>"
SCREENS = [(1280, False), (1280, True), (360, False), (360, True)]


def test_the_page_is_one_file_that_loads_nothing_and_sets_no_markup():
    policy = dict(part.split(" ", 1) for part in HEADERS["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy[kind])
    assert re.findall(r"<(?:iframe|object|base|img)\b|\bon\w+=|\bstyle=|url\(|@import|//\w+\.", TEXT) == []
    assert re.findall(r'(?:src|href|action)="([^"]*)"', TEXT) == ["data:,", "docs"]
    (script,) = re.findall(r"<script>(.*?)</script>", TEXT, re.DOTALL)
    assert not re.search(r"HTML|document\.write|\beval\b|Function\(|localStorage|cookie", script)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    write_state(folder / "birds.safetensors", 1, 4)
    write_state(folder / "hostile.safetensors", 2, 3, prefix=HOSTILE, method="linear")
    return folder


@pytest.fixture(scope="module")
def service(states, tmp_path_factory):
    limits = ("limits.image_bytes=20000", "limits.image_pixels=100000")
    with running(tmp_path_factory.mktemp("service"), states, *limits, **{USE: "open"}) as service:
        yield service


@pytest.fixture(scope="module")
def browser():
    with new_tab() as tab:
        yield tab


@pytest.fixture
def tab(browser, service):
    browser.logged.clear()
    start(browser, service)
    return browser


def start(tab, service, width=1280, dark=False):
    """Opens the page and gives the token that it asks for, by keyboard."""
    tab.open(f"{service.url}/", width, dark=dark)
    tab.until("!document.querySelector('#access').hidden")
    assert tab.js("document.querySelector('#problem').textContent").startswith("this service needs a token")
    tab.press("Tab")
    assert tab.js("document.activeElement.id") == "token"
    tab.call("Input.insertText", text="open")
    tab.press("Enter")
    tab.until("document.querySelectorAll('.tasks .bar').length === 3")
    assert tab.js(
        "document.querySelector('#access').hidden && !document.querySelector('#problem').textContent"
    )
    tab.logged.clear()  # that it was asked for


def write(folder, name, content):
    (folder / name).write_bytes(content)
    return folder / name


def texts(tab, selector):
    found = tab.js(f"[...document.querySelectorAll({selector!r})].map((each) => each.textContent)")
    return [text.replace("\xa0", " ") for text in found]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), SCREENS)
def test_pictures_get_the_classes_and_attention_of_each_task(browser, service, states, tmp_path, width, dark):
    start(browser, service, width, dark)
    content = picture(7, 96)
    browser.choose("#files", write(tmp_path, "<b>a<br>.png", content))
    browser.until(
        "document.querySelectorAll('canvas').length === 2 && document.querySelectorAll('.classes').length === 2"
    )
    for place, task in enumerate(("birds", "hostile")):
        names, shares = expected(states / f"{task}.safetensors", [content])
        best = shares[0].argsort()[::-1]
        rows = f".panel:nth-child({place + 1}) .classes"
        assert texts(browser, f"{rows} bdi") == [names[i] for i in best]
        assert texts(browser, f"{rows} .number") == [f"{100 * shares[0][i]:.1f} %" for i in best]
        told = texts(browser, f".panel:nth-child({place + 1}) .caption")[0]
        assert re.fullmatch(
            r"Attention of the class token in the last block: [\d.]+ % to the picture, [\d.]+ % to prompts\.",
            told,
        )
        assert ("0.0 % to prompts" in told) == (task == "hostile"), "a linear head has no prompts"
    assert texts(browser, "#pictures h3") == ["<b>a<br>.png"]
    assert browser.js("document.querySelectorAll('#pictures b, #pictures img:not(.thumb)').length") == 0
    assert texts(browser, "#heading") == ["1 picture"]
    assert texts(browser, "#about") == ["2 tasks on one frozen backbone."]
    assert texts(browser, ".tasks .number")[0] == "10.9 MB"
    # lit where the task looks, grey elsewhere: both are of the page's own making
    drawn = browser.js(
        "[...document.querySelectorAll('canvas')].map((c) => "
        "[...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 2))"
    )
    assert all(len(set(blue)) > 10 for blue in drawn)
    assert browser.js("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    paper = browser.js("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
    assert browser.logged == [], "nothing failed, and the policy blocked nothing"
    loaded = browser.js("performance.getEntriesByType('resource').map((each) => each.name)")
    assert {name for name in loaded if not name.startswith(("blob:", "data:", f"{service.url}/v1/"))} == set()


@pytest.mark.slow
def test_everything_can_be_done_by_keyboard_and_is_named(tab, tmp_path):
    tab.choose("#files", write(tmp_path, "a.png", picture(3)))
    tab.until("document.querySelectorAll('.classes').length === 2")
    order = ["files", "birds", "hostile", "look", "clear", "Remove a.png", "docs"]
    active = (
        "((e) => e.getAttribute('aria-label') || (e.type === 'checkbox' && e.id !== 'look' ? "
        "e.labels[0].textContent : e.id || e.getAttribute('href')))(document.activeElement)"
    )
    tab.js("document.activeElement.blur()")
    tab.js("document.querySelector('#about').setAttribute('tabindex', '-1')")
    tab.js("document.querySelector('#about').focus()")
    for name in order:
        tab.press("Tab")
        assert tab.js(active) == name
        ring = "document.querySelector('.drop')" if name == "files" else "document.activeElement"
        assert tab.js(f"getComputedStyle({ring}).outlineStyle") == "solid", (
            f"{name} shows that it has the focus"
        )
        if name == "birds":
            tab.press(" ")
            assert tab.js("[...document.querySelectorAll('.panel')].map((each) => each.hidden)") == [
                True,
                False,
            ]
        if name == "look":
            tab.press(" ")
            shown = "[...document.querySelectorAll('.picture')].some((each) => each.offsetParent)"
            assert not tab.js(shown)
    assert "a.png: " in tab.js("document.querySelector('[aria-live=polite]').textContent")
    unnamed = (
        "[...document.querySelectorAll('input, button')].filter((e) => !(e.labels?.length || e.textContent))"
    )
    assert tab.js(f"{unnamed}.length") == 0
    tab.js("document.querySelector('article button').focus()")
    tab.press("Enter")
    assert texts(tab, "#heading") == ["No picture yet"]
    assert tab.js("document.activeElement.id") == "files", "the focus is not lost with what was removed"


@pytest.mark.slow
def test_pictures_can_be_dropped_and_tasks_chosen_later(tab):
    tab.js("document.querySelector('.tasks li:last-child input').click()")
    tab.js(
        f"window.data = new DataTransfer(); data.items.add(new File([new Uint8Array({[*picture(5)]})], 'drop.png')); "
        "dispatchEvent(new DragEvent('drop', {dataTransfer: data, cancelable: true}))"
    )
    tab.until(
        "document.querySelectorAll('.classes').length === 1 && document.querySelectorAll('canvas').length === 1"
    )
    assert texts(tab, "#pictures :is(h3, h4)") == ["drop.png", "birds"]
    tab.js("document.querySelector('.tasks li:last-child input').click()")
    tab.until(
        "document.querySelectorAll('.classes').length === 2 && document.querySelectorAll('canvas').length === 2"
    )
    assert texts(tab, "#pictures :is(h3, h4)") == ["drop.png", "birds", "hostile"]
    assert tab.logged == []


@pytest.mark.slow
def test_errors_are_the_sentence_of_the_service(tab, tmp_path):
    for name, content, sentence in (
        ("bad.png", BAD, r"image 1 cannot be decoded \(not an image of a known format\)"),
        (
            "long.png",
            picture(0) + bytes(20_000),
            r"image 1 has \d+ bytes, more than the 20000 that are taken here",
        ),
        ("wide.png", picture(0, 400), "image 1 has more than the 100000 pixels that are decoded here"),
    ):
        tab.choose("#files", write(tmp_path, name, content))
        tab.until("document.querySelectorAll('article:first-child .error').length === 2")
        for text in texts(tab, "article:first-child .error"):
            assert re.fullmatch(sentence, text)
        assert texts(tab, "article:first-child .panel button") == []
    full = "the service is full: try again in 2 seconds"
    tab.js("window.real = fetch")
    for number, later in enumerate(("attention", "predict")):  # the answer says it, whichever fails first
        tab.js(
            "window.answered = 0; window.fetch = async (path, given) => { if (given.method === 'GET') return real(path, "
            f"given); if (path.endsWith('{later}')) await new Promise((go) => setTimeout(go, 500)); answered += 1; "
            f"return new Response(JSON.stringify({{error: {full!r}}}), {{status: 429}}); }}"
        )
        tab.choose("#files", write(tmp_path, f"{number}.png", picture(3 + number)))
        tab.until("answered === 4")
        tab.until("document.querySelectorAll('article:first-child .error').length === 2")
        assert texts(tab, "article:first-child .error") == [full, full]
    tab.js("window.fetch = real; document.querySelector('article .panel button').click()")
    tab.until("document.querySelectorAll('article:first-child .classes').length === 1")
    none = "attention maps need a class token"
    tab.js(f"window.fetch = async () => new Response(JSON.stringify({{error: {none!r}}}), {{status: 422}})")
    tab.js("document.querySelector('article:first-child .panel:last-child button').click()")
    tab.until(
        f"document.querySelector('article:first-child .panel:last-child .caption').textContent === {none!r}"
    )


@pytest.mark.slow
def test_a_segmentation_task_shows_its_mask_over_the_picture(browser, tmp_path):
    torch.manual_seed(0)
    classifier = visprompt.build(DEMO, "linear", 3, kind="segmentation")
    with torch.no_grad():
        classifier.head.weight.normal_()
    names = ["sky", HOSTILE, "sand"]
    visprompt.save(classifier, tmp_path / "beach.safetensors", class_names=names, task="beach")
    with running(tmp_path, tmp_path) as service:
        browser.logged.clear()
        browser.open(f"{service.url}/", 1280)
        browser.until("document.querySelectorAll('.tasks .bar').length === 2")
        content = picture(7, 96)
        browser.choose("#files", write(tmp_path, "a.png", content))
        browser.until("document.querySelectorAll('.overlay img').length === 2")
        browser.until("document.querySelector('.caption').textContent")
        mask = service.predict("beach", content, top_k=5).json()["predictions"][0]["mask"]
        assert texts(browser, ".classes bdi") == [one["name"] for one in mask["classes"]]
        shares = [f"{100 * one['share']:.1f} %" for one in mask["classes"]]
        assert texts(browser, ".classes .number") == shares
        size = "(({ naturalWidth: w, naturalHeight: h }) => [w, h])(document.querySelectorAll('.overlay img')[1])"
        assert browser.js(size) == [mask["width"], mask["height"]]
        colours = "[...document.querySelectorAll('.swatch')].map((each) => each.style.background)"
        rgb = [tuple(bytes.fromhex(one["colour"][1:])) for one in mask["classes"]]
        assert browser.js(colours) == [f"rgb{each}" for each in rgb]
        assert texts(browser, ".caption")[0].startswith("a segmentation task pools no token")
        assert [line for line in browser.logged if "422" not in str(line)] == []
