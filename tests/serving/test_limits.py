"""Limits, the room of a service, and the settings of a command line that do not fit."""

import io
import socket
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from helpers.cli import call, composed
from helpers.service import picture, write_state
from visprompt.data.sources.decoders import decoder_of
from visprompt.data.sources.images import TooLong
from visprompt.errors import UserError
from visprompt.models.backbones import DEMO
from visprompt.models.bank import Bank
from visprompt.runs.compose import plain
from visprompt.serving.access import Tokens, _is_one_of
from visprompt.serving.limits import Admission, Limits
from visprompt.serving.pictures import prepare
from visprompt.serving.refused import Refused
from visprompt.serving.run import serve


def limits(**changes):
    with composed("serve", "states=x") as cfg:
        return Limits(**plain(cfg)["limits"] | changes)


def test_room_is_taken_and_given_back_whatever_happens():
    admission = Admission(limits(queue=3, images=3, request_bytes=100, held_bytes=100), lambda: 0.7)
    with admission.enter() as ticket:
        ticket.take(images=2, size=60)
        assert (admission.images, admission.bytes) == (3, 60)
        with (
            pytest.raises(Refused, match="the service is full: try again in 3 seconds") as refused,
            admission.enter(),
        ):
            pass
        assert refused.value.status == 429
        assert refused.value.headers == {"Retry-After": "3"}
        with pytest.raises(Refused):
            ticket.take(size=41)
        assert (admission.images, admission.bytes) == (3, 60)
    assert (admission.images, admission.bytes) == (0, 0)
    with pytest.raises(ZeroDivisionError), admission.enter():
        1 / 0  # noqa: B018  # any error
    assert admission.images == 0


def test_a_request_that_could_never_be_admitted_is_an_error_of_the_settings():
    with pytest.raises(
        UserError, match=r"limits\.images=9 is more than limits\.queue=8: give limits\.queue at least"
    ):
        limits(images=9, queue=8)
    with pytest.raises(UserError, match=r"limits\.request_bytes=9 is more than limits\.held_bytes=8"):
        limits(request_bytes=9, held_bytes=8)


def test_tokens_are_compared_whole():
    class Given:
        credentials = "open"

    assert _is_one_of(Given, None, "open")
    assert not any(_is_one_of(Given, token) for token in (None, "", "ope", "opens", "Open"))
    assert not _is_one_of(None, "open")
    assert Tokens("a", None).admin is None
    sent = Given()
    sent.credentials = "pässwort".encode().decode("latin-1")  # as Starlette reads the bytes of a header
    assert _is_one_of(sent, "pässwort")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return Bank(DEMO).add("a", write_state(tmp_path_factory.mktemp("state") / "a.safetensors", 0, 3))


def test_each_form_of_an_image_gives_one_input_or_one_reason(task):
    bounds = limits(image_pixels=70 * 64)
    assert prepare(picture(0), 1, task, bounds).image.shape == (3, 64, 64)
    assert prepare(np.zeros((20, 30, 3), np.uint8), 1, task, bounds).image.shape == (3, 64, 64)
    assert prepare(np.zeros((3, 64, 64), np.float32), 1, task, bounds).image.shape == (3, 64, 64)
    for content, status, sentence in (
        (np.zeros((71, 64, 3), np.uint8), 413, "image 7 has more than the 4480 pixels that are decoded here"),
        (np.zeros((20, 30, 4), np.uint8), 400, "image 7 has the shape [20, 30, 4], not [height, width, 3]"),
        (np.full((3, 64, 64), np.nan, np.float32), 400, "image 7 has numbers that are not finite"),
        (np.zeros((3, 32, 64), np.float32), 400, "image 7 has the shape [3, 32, 64], not [3, 64, 64]"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), 400, "image 7 cannot be decoded (not an image of a known format)"),
    ):
        refused = prepare(content, 7, task, bounds)
        assert (refused.status, str(refused)) == (status, sentence)


def test_a_small_file_that_resizing_would_make_huge_is_refused(task):
    """A strip of 16 x 3000 pixels has a short side of 72 only if it becomes 72 x 13,500."""
    cropped = replace(task, preprocessing={**task.preprocessing, "resize": "short_side", "short_side": 72})
    strip, bounds = np.zeros((16, 3000, 3), np.uint8), limits(image_pixels=100_000)
    file = io.BytesIO()
    Image.fromarray(strip).save(file, "PNG")
    for content in (strip, file.getvalue()):
        refused = prepare(content, 1, cropped, bounds)
        assert (refused.status, str(refused)) == (
            413,
            "image 1 would be resized to 13,500 x 72 pixels, more than the 100,000 allowed",
        )
        assert prepare(content, 1, cropped, limits(image_pixels=1_000_000)).image.shape == (3, 64, 64)
    with pytest.raises(
        TooLong, match=r"^would be resized to 13,500 x 72 pixels, more than the 100,000 allow"
    ):
        decoder_of(cropped.preprocessing, 100_000)(file.getvalue())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "states has no default: give states=..."),
        (("states=x", "limits.queue=0"), "limits.queue=0 does not fit: give a whole number from 1"),
        (("states=x", "port=70000"), "port=70000 does not fit: give a whole number from 0 to 65535"),
        (("states=x", "admin=1"), "unknown key 'admin'"),
    ],
)
def test_a_setting_that_does_not_fit_is_one_sentence_within_seconds(words, sentence, tmp_path):
    done = call("serve", *words, f"paths.log_dir={tmp_path}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {sentence}")
    assert done.stderr.count("\n") == 1


def refused(*words):
    """The sentence with which a service does not start."""
    with composed("serve", *words) as cfg, pytest.raises(UserError) as error:
        serve(**{name: value for name, value in plain(cfg).items() if name != "paths"})
    return str(error.value)


def test_a_service_that_cannot_start_says_why_in_one_sentence(tmp_path):
    state = write_state(tmp_path / "a.safetensors", 0, 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "b.safetensors").write_bytes(b"nothing")
    assert refused("states=none").startswith(
        "there is no tuned state at states=none: give a folder of states, "
    )
    assert refused("states=x", "limits.images=300").startswith(
        "limits.images=300 is more than limits.queue=256"
    )
    assert (
        refused("states=x", "dtype=int8") == "unknown dtype 'int8': choose one of bfloat16, float16, float32"
    )
    assert (
        refused("states=x", "device=gpu")
        == "device=gpu is not a device of this machine: choose auto, cpu or cuda"
    )
    sentence = "holds no tuned state: put NAME.safetensors or a run's folder into it"
    assert sentence in refused(f"states={tmp_path / 'empty'}", "port=0")
    assert "b.safetensors is not a readable tuned state" in refused(f"states={tmp_path / 'broken'}", "port=0")
    listed = f"states=[{state},{tmp_path / 'broken' / 'b.safetensors'}]"
    assert "b.safetensors is not a readable tuned state" in refused(listed, "port=0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused(f"states={state}", f"port={port}") == (
            f"cannot listen on 127.0.0.1:{port} (Address already in use): choose another port=... or host=..."
        )
    assert "cannot listen on no.such.host.invalid:0" in refused(
        f"states={state}", "host=no.such.host.invalid", "port=0"
    )
