"""The endpoints of a service that runs, asked over HTTP."""

import asyncio
import base64
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import visprompt
from helpers.service import ADMIN, BAD, expected, picture, running, until, write_state
from visprompt.data.sources.decoders import decoder_of
from visprompt.data.transforms import to_input
from visprompt.models.attention import last_attention
from visprompt.models.methods.describe import MEMBERS
from visprompt.models.tuned_state import load_state
from visprompt.serving.access import USE
from visprompt.serving.limits import Limits
from visprompt.serving.refused import Refused
from visprompt.serving.service import Service
from visprompt.serving.states import States

PICTURES = [picture(seed) for seed in range(4)]
LIMITS = (
    "limits.images=5",
    "limits.image_pixels=10000",
    "limits.image_bytes=50000",
    "limits.request_bytes=200000",
)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    for number, method in enumerate(("vpt_deep", "linear", "vpt_shallow")):
        write_state(folder / f"{method}.safetensors", number, 3 + number, method=method)
    return folder


@pytest.fixture(scope="module")
def service(states, tmp_path_factory):
    with running(tmp_path_factory.mktemp("service"), states, *LIMITS) as service:
        yield service


def as_json(*contents, **others):
    return {"images": [base64.b64encode(content).decode() for content in contents], **others}


@pytest.mark.parametrize("task", ["vpt_deep", "vpt_shallow"])
@pytest.mark.parametrize("way", ["form", "json"])
def test_images_get_the_classes_of_their_tasks_own_classifier(service, states, task, way):
    names, shares = expected(states / f"{task}.safetensors", PICTURES)
    if way == "form":
        answer = service.predict(task, *PICTURES, top_k=2)
    else:
        answer = service.post(f"/v1/tasks/{task}/predict", json=as_json(*PICTURES, top_k=2))
    assert answer.status_code == 200
    assert answer.json()["task"] == task
    for prediction, row in zip(answer.json()["predictions"], shares, strict=True):
        best = np.argsort(row)[::-1][:2]
        assert [c["name"] for c in prediction["classes"]] == [names[i] for i in best]
        assert [c["probability"] for c in prediction["classes"]] == pytest.approx(row[best], abs=1e-4)


def test_without_top_k_five_classes_at_most(service):
    answer = service.post("/v1/tasks/vpt_shallow/predict", json=as_json(PICTURES[0]))
    assert len(answer.json()["predictions"][0]["classes"]) == 5
    answer = service.post("/v1/tasks/vpt_deep/predict", json=as_json(PICTURES[0], top_k=99))
    assert len(answer.json()["predictions"][0]["classes"]) == 3


def test_a_bad_image_is_named_and_the_others_of_its_request_are_answered(service, states):
    names, shares = expected(states / "vpt_deep.safetensors", PICTURES[:2])
    answer = service.predict("vpt_deep", PICTURES[0], BAD, PICTURES[1])
    assert answer.status_code == 207
    first, bad, last = answer.json()["predictions"]
    assert bad == {"error": "image 2 cannot be decoded (not an image of a known format)", "status": 400}
    assert [p["classes"][0]["name"] for p in (first, last)] == [names[i] for i in shares.argmax(1)]


@pytest.mark.parametrize(
    ("content", "status", "sentence"),
    [
        (BAD, 400, "image 1 cannot be decoded (not an image of a known format)"),
        (b"", 400, "image 1 cannot be decoded (not an image of a known format)"),
        (PICTURES[0][:100], 400, "image 1 cannot be decoded"),
        (
            picture(0, 21)[:0] + picture(0, 20),
            400,
            "image 1 is 20 x 14 pixels, less than 16 on the short side",
        ),
        (picture(0, 120), 413, "image 1 has more than the 10000 pixels that are decoded here"),
        (PICTURES[0] + bytes(50000), 413, "bytes, more than the 50000 that are taken here"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", 400, "not an image of a known format"),
    ],
)
def test_an_image_that_cannot_be_used_is_an_error_of_the_client_in_one_sentence(
    service, content, status, sentence
):
    answer = service.predict("vpt_deep", content)
    assert answer.status_code == status
    assert sentence in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    ("given", "status", "sentence"),
    [
        ({"json": as_json()}, 400, "the request holds no image: send at least one"),
        (
            {"json": {"images": ["http://127.0.0.1/a.png"]}},
            400,
            "image 1 is not base64: send the file's bytes",
        ),
        ({"json": {"images": ["file:///etc/passwd"]}}, 400, "image 1 is not base64"),
        ({"json": {"image": "x"}}, 400, "images has no value"),
        ({"json": as_json(BAD, url="http://a")}, 400, "url does not fit"),
        ({"json": as_json(BAD, top_k=0)}, 400, "top_k does not fit"),
        ({"json": as_json(*PICTURES, *PICTURES)}, 413, "the request holds 8 images, more than the 5 allowed"),
        ({"files": [("image", BAD)] * 6}, 400, "Too many files"),
        ({"files": [("image", BAD)], "data": {"top_k": "many"}}, 400, "top_k is not a number of classes"),
        ({"files": [("image", BAD)], "data": {"url": "http://a"}}, 400, "unknown field 'url'"),
        ({"files": [("image", bytes(210_000))]}, 413, "the request has more than the 200000 bytes allowed"),
        (
            {"data": iter([bytes(150_000)] * 2), "headers": {"Content-Type": "application/json"}},
            413,
            "200000 bytes",
        ),
        (
            {"data": b"[" * 100_000, "headers": {"Content-Type": "application/json"}},
            400,
            "the request is not JSON",
        ),
        ({"json": {"images": [1] * 6}}, 413, "the request holds 6 images, more than the 5 allowed"),
        ({"json": {"images": [1]}}, 400, "images.0 does not fit"),
        (
            {"json": {f"key {i}": 1 for i in range(11)}},
            400,
            "it has unknown keys, give only images and top_k",
        ),
        (
            {"files": [("image", BAD)], "data": {"top_k": "000000001" + "9" * 5000}},
            400,
            "top_k is not a number",
        ),
        ({"data": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "the form cannot be read"),
        (
            {"data": b"x", "headers": {"Content-Type": "text/plain"}},
            415,
            "send the images as multipart/form-data",
        ),
        (
            {"data": b"x", "headers": {"Content-Type": "application/json", "Content-Encoding": "gzip"}},
            415,
            "compressed requests are not read",
        ),
    ],
)
def test_a_request_that_cannot_be_read_is_refused_in_one_sentence(service, given, status, sentence):
    answer = service.post("/v1/tasks/vpt_deep/predict", **given)
    assert (answer.status_code, sentence in answer.json()["error"]) == (status, True), answer.text


@pytest.mark.parametrize(
    "name", ["vpt_dep", "..%2f..%2fetc%2fpasswd", "%2e%2e", "a%00b", "x" * 500, "logs/a"]
)
def test_a_name_never_leads_out_of_the_folder(service, name):
    answer = service.predict(name, PICTURES[0])
    assert answer.status_code == 404
    for action in ("load", "unload"):
        assert service.post(f"/v1/tasks/{name}/{action}", headers=ADMIN).status_code == 404
        assert service.post(f"/v2/repository/models/{name}/{action}", headers=ADMIN).status_code == 404
    if name == "vpt_dep":
        assert answer.json()["error"].startswith("unknown task 'vpt_dep': did you mean vpt_deep")


def test_tasks_are_listed_unloaded_and_loaded_by_the_administrator_alone(service):
    listed = {task["name"]: task for task in service.get("/v1/tasks").json()}
    assert set(listed) == {"vpt_deep", "linear", "vpt_shallow"}
    assert all(task["ready"] and task["in_memory"] for task in listed.values())
    about = service.get("/v1/tasks/linear").json()
    assert about["classes"] == ["linear_0", "linear_1", "linear_2", "linear_3"]
    assert about["method"]["name"] == "linear"
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic let-me-in"}):
        refused = service.post("/v1/tasks/linear/unload", headers=headers)
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert service.post("/v1/tasks/linear/unload", headers=ADMIN).json()["ready"] is False
    gone = service.predict("linear", PICTURES[0])
    assert gone.status_code == 404
    assert gone.json()["error"] == "task linear is unloaded: load it with POST /v1/tasks/linear/load"
    assert service.get("/v1/tasks/linear").json()["reason"] == "it is unloaded"
    assert service.post("/v1/tasks/linear/load", headers=ADMIN).json()["ready"] is True
    assert service.predict("linear", PICTURES[0]).status_code == 200


def test_states_put_into_the_folder_are_served_and_those_taken_away_are_not(service, states, tmp_path):
    new = write_state(tmp_path / "late.safetensors", 9, 4)
    assert service.predict("late", PICTURES[0]).status_code == 404
    shutil.copy(new, states / "late.safetensors")
    # found by name on demand, before the thread looks
    assert (
        service.predict("late", PICTURES[0])
        .json()["predictions"][0]["classes"][0]["name"]
        .startswith("late_")
    )
    write_state(new, 10, 4, prefix="later")
    shutil.copy(new, states / "late.safetensors")
    until(lambda: "later_" in service.predict("late", PICTURES[0]).text)
    (states / "late.safetensors").write_bytes(new.read_bytes()[:5000])
    until(lambda: not service.get("/v1/tasks/late").json()["ready"])
    assert "later_" in service.predict("late", PICTURES[0]).text, "the one before stays"
    (states / "late.safetensors").unlink()
    until(lambda: service.predict("late", PICTURES[0]).status_code == 404)
    (states / "run").mkdir()
    shutil.copy(new, states / "run" / "tuned.safetensors")
    until(lambda: any(task["name"] == "run" for task in service.get("/v1/tasks").json()))
    assert "later_" in service.predict("run", PICTURES[0]).text
    shutil.rmtree(states / "run")
    (states / "broken.safetensors").write_bytes(b"no state")
    assert service.predict("broken", PICTURES[0]).status_code == 503
    (states / "broken.safetensors").unlink()
    until(lambda: len(service.get("/v1/tasks").json()) == 3)


def test_health_openapi_and_its_page(service):
    assert service.get("/health/live").json() == {"status": "live"}
    assert service.get("/health/ready").json() == {"status": "ready"}
    described = service.get("/openapi.json").json()
    assert {"/v1/tasks/{task}/predict", "/v2/models/{task}/infer", "/metrics"} <= set(described["paths"])
    body = described["paths"]["/v1/tasks/{task}/predict"]["post"]["requestBody"]["content"]
    assert set(body) == {"multipart/form-data", "application/json"}
    page = service.get("/docs").text
    assert "http://" not in page
    assert "https://" not in page, "the page needs no other host"
    missing = service.get("/nothing")
    assert (missing.status_code, missing.json()["error"]) == (404, "Not Found: /docs lists what is served")


@pytest.mark.parametrize("way", ["form", "json"])
def test_attention_is_that_of_the_task_s_own_classifier_over_the_picture_that_the_backbone_saw(
    service, states, way
):
    given = {"files": [("image", PICTURES[0])]} if way == "form" else {"json": as_json(PICTURES[0])}
    told = service.post("/v1/tasks/vpt_deep/attention", **given).json()
    state = load_state(states / "vpt_deep.safetensors")
    image = to_input(decoder_of(state.preprocessing)(PICTURES[0]), state.preprocessing)
    expected = last_attention(visprompt.load(states / "vpt_deep.safetensors"), image[None])
    assert (told["task"], told["asking"]) == ("vpt_deep", "the class token")
    assert np.array(told["patches"]) == pytest.approx(expected.patches[0].mean(0).numpy(), abs=1e-5)
    assert np.sum(told["patches"]) + told["class_token"] + told["prompts"] == pytest.approx(1, abs=1e-5)
    assert told["prompts"] > 0.01
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(told["image"]))), np.float32) / 255
    seen = image * torch.tensor(state.preprocessing["std"]).view(3, 1, 1)
    seen += torch.tensor(state.preprocessing["mean"]).view(3, 1, 1)
    assert (torch.from_numpy(shown).permute(2, 0, 1) - seen.clamp(0, 1)).abs().max() < 0.5 / 255 + 1e-6


def test_attention_takes_one_good_image(service):
    two = service.post("/v1/tasks/vpt_deep/attention", json=as_json(*PICTURES[:2]))
    assert (two.status_code, two.json()["error"]) == (400, "the request holds 2 images: send one")
    bad = service.post("/v1/tasks/vpt_deep/attention", files=[("image", BAD)])
    assert (bad.status_code, bad.json()["error"][:25]) == (400, "image 1 cannot be decoded")


def test_a_backbone_without_a_class_token_is_one_sentence():
    """In this process, as the states of such a backbone would need its weights."""
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **MEMBERS["Swin"][1])
    bank = visprompt.Bank(model)
    limits = Limits(**dict.fromkeys(Limits.__dataclass_fields__, 10**6))
    service = Service(bank, States(bank, dict), limits)
    task = SimpleNamespace(name="birds", prepared=SimpleNamespace(alone=None, layers={}, rows=(None,)))
    task.preprocessing = {"size": 32}
    with pytest.raises(
        Refused, match=r"^attention maps need a class token .* is a SwinTransformer"
    ) as refused:
        asyncio.run(service.attention(task, np.zeros((3, 32, 32), np.float32)))
    assert refused.value.status == 422
    service.close()


def test_the_backbone_is_there_once(service):
    told = service.get("/v1/backbone").json()
    assert told == {"name": "vit64_tiny_imagenet_100", "bytes": 4 * 2_719_296}


def test_metrics_count_requests_images_batches_and_tasks(service):
    service.predict("vpt_deep", *PICTURES[:3], BAD)
    text = service.get("/metrics").text
    values = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line[0] != "#"
    }
    assert values['visprompt_requests_total{code="207",route="/v1/tasks/{task}/predict"}'] >= 1
    assert values['visprompt_request_seconds_count{route="/v1/tasks/{task}/predict"}'] >= 1
    assert values['visprompt_images_total{result="ok",task="vpt_deep"}'] >= 3
    assert values['visprompt_images_total{result="bad",task="vpt_deep"}'] >= 1
    assert values["visprompt_batch_images_sum"] >= 3
    assert values["visprompt_batch_tasks_count"] >= 1
    assert values["visprompt_tasks"] == values["visprompt_tasks_in_memory"] == 3
    assert values["visprompt_tasks_bytes"] > 10_000
    assert values["visprompt_admitted_images"] == values["visprompt_held_bytes"] == 0
    assert values["process_resident_memory_bytes"] > 1e8
    assert "x" * 20 not in text, "no text of a client is a label"


@pytest.mark.slow
def test_a_token_for_use_and_no_token_for_administration(tmp_path):
    state = write_state(tmp_path / "birds.safetensors", 0, 3)
    env = {USE: "both", "VISPROMPT_ADMIN_TOKEN": ""}
    with running(tmp_path, state, **env) as service:
        for path in ("/v1/tasks", "/metrics", "/v2", "/v2/models/birds"):
            assert service.get(path).status_code == 401
            assert service.get(path, headers={"Authorization": "Bearer both"}).status_code == 200
        assert service.predict("birds", PICTURES[0]).status_code == 401
        answer = service.post("/v1/tasks/birds/unload", headers={"Authorization": "Bearer both"})
        assert answer.status_code == 403
        assert answer.json() == {
            "error": "loading and unloading is off: start the service with VISPROMPT_ADMIN_TOKEN set"
        }
        assert service.get("/health/ready").status_code == 200
        assert json.loads(service.get("/openapi.json").text)
        assert service.stop() == 0
    assert "Traceback" not in service.log.read_text()
