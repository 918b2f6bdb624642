"""How settings are read and quoted: free texts, what W&B's agents write, `~`."""

import shlex
from operator import attrgetter

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_compose import said
from test_words import became

from helpers.cli import ROOT, composed
from visprompt.models.methods import METHODS, option_kinds
from visprompt.runs import compose, settings
from visprompt.runs.cli.arguments import WHOLE, is_whole, plain, quoted
from visprompt.runs.cli.words import SCRIPTS
from visprompt.runs.paths import PATHS, TEXTS

UNREADABLE = (
    "/data/my birds [v2]",
    "/a=b",
    "/a#b",
    "/vögel",
    "/日本",
    "/a{b}",
    "/a(b)",
    "/a/it's",
    '/a"b',
    "/a;b&c",
    "/a<b>",
)
OTHERWISE = {
    "/a,b": "several values, for which -m is missing",
    "[a]": "a list",
    "{a:b}": "a mapping",
    "1e3": "the number 1000.0",
    "2024": "the number 2024",
    "True": "true",
    " x": "'x'",
}


@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])))
def test_the_quoted_form_of_any_text_is_one_word_of_a_shell_that_hydra_reads_as_it_is(text):
    (argument,) = shlex.split(quoted("data.root", text))
    override = OverridesParser.create().parse_override(argument)
    assert (override.key_or_group, override.value()) == ("data.root", text)


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("/data/my birds [v2]", "\"data.root='/data/my birds [v2]'\""),
        ("/a/it's", "\"data.root='/a/it\\'s'\""),
        ("/a/$b", "'data.root='\"'\"'/a/$b'\"'\"''"),
    ],
)
def test_the_quoted_form_is_as_plain_as_a_shell_lets_it_be(text, typed):
    assert quoted("data.root", text) == typed


@pytest.mark.parametrize("text", UNREADABLE)
def test_what_hydra_cannot_read_is_answered_with_the_form_to_type(capsys, monkeypatch, text):
    sentence = f"error: data.root={text} cannot be read: type {quoted('data.root', text)}\n"
    assert said(capsys, monkeypatch, "train", "data=folder", f"data.root={text}") == sentence
    assert said(capsys, monkeypatch, "train", "-m", "data=folder", f"data.root={text}") == sentence
    typed = ["data=folder", *shlex.split(quoted("data.root", text))]
    assert became(monkeypatch, "train", *typed) == typed
    with composed("train", *typed) as cfg:
        (job,) = compose.jobs(cfg)
    assert job.data.root == text


@pytest.mark.parametrize(("text", "reading"), OTHERWISE.items())
def test_a_free_text_that_hydra_reads_as_something_else_is_answered_too(capsys, monkeypatch, text, reading):
    for key in ("data.root", "data.name"):
        sentence = f"error: {key}={text} is read as {reading}: for a text type {quoted(key, text)}\n"
        assert said(capsys, monkeypatch, "train", "data=folder", f"{key}={text}") == sentence


def test_a_text_that_the_shell_took_apart_is_put_together(capsys, monkeypatch):
    assert said(
        capsys, monkeypatch, "train", "data=folder", "data.root=/data/my", "birds", "[v2]", "seed=1"
    ) == (
        "error: 'birds' is not key=value: a value with spaces is quoted: type \"data.root='/data/my birds [v2]'\"\n"
    )
    assert said(capsys, monkeypatch, "train", "seed=1", "birds") == (
        "error: 'birds' is not key=value: settings are typed as seed=1, for example\n"
    )


@pytest.mark.parametrize("argument", ["=3", "a b=3", "é=1"])
def test_a_key_that_cannot_be_read_is_one_sentence(capsys, monkeypatch, argument):
    sentence = f"error: {argument!r} cannot be read: settings are typed as key=value, such as seed=1\n"
    assert said(capsys, monkeypatch, "train", argument) == sentence


def test_a_reference_to_no_key_is_one_sentence(capsys, monkeypatch):
    assert said(capsys, monkeypatch, "train", "data=folder", "data.root=/a/${b}") == (
        "error: data.root=/a/${b} refers to a key that does not exist\n"
    )
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert became(monkeypatch, "train", "data=folder", "data.root=${oc.env:SCRATCH}/x")


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        ("method.depth=None", "method.depth=null"),
        ("backbone.weights=None", "backbone.weights=null"),
        ("method.num_tokens=10.0", "method.num_tokens=10"),
        ("recipe.epochs=2.0", "recipe.epochs=2"),
        ("seed=1.", "seed=1"),
        ("+method.prune_tokens=[50.0, 70.0]", "+method.prune_tokens=[50, 70]"),
        ("method.num_tokens=5.0,10.0", "method.num_tokens=5,10"),
        ("tags=['a', None]", "tags=['a', null]"),
        ("recipe.lr=2.0", "recipe.lr=2.0"),
        ("method.num_tokens=10.5", "method.num_tokens=10.5"),
        ("data.name='None'", "data.name='None'"),
        ("method.shared=none", "method.shared=none"),
        ("data.name=Nonesuch", "data.name=Nonesuch"),
        ("tags=[v1.0]", "tags=[v1.0]"),
        ("~callbacks.progress_bar", "~callbacks.progress_bar"),
    ],
)
def test_python_s_spellings_are_written_as_hydra_wants_them(typed, written):
    assert plain(typed) == written


@pytest.mark.parametrize(
    ("typed", "key", "value"),
    [
        ("method.depth=None", "method.depth", None),
        ("method.num_tokens=10.0", "method.num_tokens", 10),
        ("compile=True", "compile", True),
        ("trainer.devices=[0, 1]", "trainer.devices", [0, 1]),
        ("tags=['a', 'b c']", "tags", ["a", "b c"]),
        ("recipe.lr=2.0", "recipe.lr", 2.0),
    ],
)
def test_what_an_agent_passes_is_a_value_of_the_job(monkeypatch, typed, key, value):
    with composed("train", *became(monkeypatch, "train", typed)) as cfg:
        (job,) = compose.jobs(cfg)
    got = attrgetter(key)(job)
    assert (got, type(got)) == (value, type(value)) or list(got) == value


def defaults(script, *choices):
    """The values of all keys of an entry point, as they are without any setting."""
    with compose.composing():
        from hydra import compose as hydra_compose

        cfg = hydra_compose(script, list(choices))
    found = {}

    def walk(node, prefix):
        for key in map(str, node):
            if key == "rows" or OmegaConf.is_missing(node, key):
                continue
            value = node[key]
            if OmegaConf.is_dict(value):
                walk(value, f"{prefix}{key}.")
            else:
                found[f"{prefix}{key}"] = value

    walk(cfg, "")
    return found


def test_every_whole_number_of_every_config_and_method_is_known_as_one():
    for method in METHODS:
        for name, kind in option_kinds(method).items():
            if "int" in str(kind) and "Any" not in str(kind):
                assert is_whole(f"method.{name}"), (method, name)
    assert not is_whole("method.dropout")
    assert not is_whole("method.initial")
    given = {"data": ("data=folder", "data.root=/x")}
    for script in SCRIPTS:
        found = defaults(script, *given["data"]) if script == "train" else defaults(script)
        whole = {key for key, value in found.items() if type(value) is int}
        fractions = {"recipe.warmup_epochs"}  # what may be a fraction too
        assert {key for key in whole if not is_whole(key)} <= fractions, script
    whole = {key for key, allowed in settings._ALLOWED.items() if allowed.fits(2) and not allowed.fits(2.5)}
    assert whole <= WHOLE | {"precision", "backbone.kwargs", "engine.gpus_per_run"}


@pytest.mark.parametrize("key", [*PATHS])
def test_a_tilde_at_the_start_of_every_path_is_written_out(monkeypatch, key):
    monkeypatch.setenv("HOME", "/home/me")
    assert plain(f"{key}=~/birds") == f"{key}=/home/me/birds"
    assert plain(f"+{key}=[~/a, ~,b~]") == f"+{key}=[/home/me/a,/home/me,b~]"
    assert plain(f"{key}=~nobody-of-this-name/x") == f"{key}=~nobody-of-this-name/x"


def test_paths_are_texts_and_each_is_a_key_of_some_entry_point():
    assert set(PATHS) < set(TEXTS)
    known = set()
    for script in SCRIPTS:
        known |= set(OmegaConf.load(ROOT / "configs" / f"{script}.yaml"))
    known |= {f"paths.{key}" for key in OmegaConf.load(ROOT / "configs" / "paths" / "default.yaml")}
    assert {key for key in PATHS if "." not in key or key.startswith("paths.")} <= known
