"""A segmentation task of the service answers masks: as JSON, as a PNG, and by the Open Inference Protocol."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

import visprompt
from helpers.cli import NET
from helpers.segmented import CLASSES, picture, write_state
from visprompt.data.mask_pictures import COLOURS
from visprompt.data.transforms import to_input
from visprompt.models.backbones import DEMO, BackboneSpec, build_backbone
from visprompt.models.bank import Bank
from visprompt.models.dense_prediction import mask_of
from visprompt.models.tuned_state import load_state
from visprompt.serving.access import Tokens
from visprompt.serving.app import build_app
from visprompt.serving.limits import Limits
from visprompt.serving.service import Service
from visprompt.serving.states import States, source_of

SIZES = ((40, 90), (70, 64))
LIMITS = Limits(
    image_bytes=100_000, image_pixels=9000, images=4, request_bytes=10**6, held_bytes=10**7, batch=4,
    batch_wait_ms=1, queue=8, seconds=60, drain_seconds=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    write_state(folder / "beach.safetensors", num_tokens=3)
    write_state(folder / "flat.safetensors", kind="single_label")
    return folder


@pytest.fixture(scope="module")
def client(folder):
    bank = Bank(build_backbone(BackboneSpec(name=DEMO, pretrained=False, kwargs=NET)))
    states = States(bank, source_of(str(folder)))
    states.refresh()
    service = Service(bank, states, LIMITS)
    yield TestClient(build_app(service, Tokens(None, None))[0])
    service.close()


@pytest.fixture(scope="module")
def photos(folder, tmp_path_factory):
    """The content of pictures, and their masks by the state's own classifier."""
    place, state = tmp_path_factory.mktemp("photos"), folder / "beach.safetensors"
    classifier, how = visprompt.load(state), load_state(state).preprocessing
    contents, masks = [], []
    for seed, size in enumerate(SIZES):
        pixels = picture(place / f"{seed}.png", *size, seed=seed)
        contents.append((place / f"{seed}.png").read_bytes())
        with torch.inference_mode():
            masks.append(mask_of(classifier(to_input(pixels, how)[None])[0], size).labels)
    return contents, masks


def post(client, *contents, task="beach", what="predict", **headers):
    files = [("image", ("a", content)) for content in contents]
    return client.post(f"/v1/tasks/{task}/{what}", files=files, headers=headers)


def test_json_has_a_mask_for_each_image_with_the_classes_that_occur(client, photos):
    contents, masks = photos
    answer = post(client, *contents, b"no image")
    assert answer.status_code == 207
    *found, bad = answer.json()["predictions"]
    assert bad == {"error": "image 3 cannot be decoded (not an image of a known format)", "status": 400}
    for each, labels in zip(found, masks, strict=True):
        mask = each["mask"]
        with Image.open(io.BytesIO(base64.b64decode(mask["png"]))) as image:
            assert np.array_equal(np.asarray(image), labels)
        assert (mask["height"], mask["width"]) == labels.shape
        shares = {one["name"]: one["share"] for one in mask["classes"]}
        counts = {CLASSES[i]: np.mean(labels == i) for i in range(3) if (labels == i).any()}
        assert shares == pytest.approx(counts)
        assert sorted(shares.values(), reverse=True) == list(shares.values())
        for one in mask["classes"]:
            assert CLASSES[one["index"]] == one["name"]
            assert one["colour"] == "#{:02x}{:02x}{:02x}".format(*COLOURS[one["index"]])


def test_a_png_is_the_mask_of_one_image(client, photos):
    contents, masks = photos
    answer = post(client, contents[1], accept="image/png")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), masks[1])
    several = post(client, *contents, accept="image/png")
    assert several.status_code == 406
    assert several.json() == {"error": "a PNG is one mask, and the request holds 2 images: send one"}
    assert post(client, b"no image", accept="image/png").status_code == 400
    flat = post(client, contents[0], task="flat", accept="image/png")
    assert "classes" in flat.json()["predictions"][0], "a task without masks answers as always"


def test_the_masks_of_a_request_are_limited_together(client, photos):
    """Three pictures of at most 4,480 pixels; two of them fit."""
    statuses = [each.get("status") for each in post(client, *photos[0], photos[0][1]).json()["predictions"]]
    assert sorted(statuses, key=str) == [413, None, None]


def test_a_mask_has_no_attention_and_says_its_kind(client, photos):
    refused = post(client, photos[0][0], what="attention")
    assert refused.status_code == 422
    assert refused.json()["error"].startswith("a segmentation task pools no token")
    assert client.get("/v1/tasks/beach").json()["kind"] == "segmentation"


def infer(client, *contents, task="beach", **more):
    data = [base64.b64encode(content).decode() for content in contents]
    given = {"name": "images", "datatype": "BYTES", "shape": [len(data)], "data": data}
    return client.post(f"/v2/models/{task}/infer", json={"inputs": [given], **more})


def test_the_open_inference_protocol_has_one_output_of_whole_numbers(client, photos):
    contents, masks = photos
    about = client.get("/v2/models/beach").json()
    assert about["outputs"] == [{"name": "mask", "datatype": "UINT8", "shape": [-1, -1, -1]}]
    assert about["parameters"] == {"class_names": [*CLASSES], "kind": "segmentation"}
    assert client.get("/v2/models/flat").json()["parameters"]["kind"] == "single_label"
    (output,) = infer(client, contents[0]).json()["outputs"]
    assert (output["datatype"], output["shape"]) == ("UINT8", [1, *SIZES[0]])
    assert np.array_equal(np.reshape(output["data"], SIZES[0]), masks[0])
    answer = infer(client, contents[1], contents[1], parameters={"binary_data_output": True})
    end = int(answer.headers["inference-header-content-length"])
    assert np.array_equal(np.frombuffer(answer.content[end:], np.uint8).reshape(2, *SIZES[1])[1], masks[1])
    pixels = {"name": "images", "datatype": "UINT8", "shape": [1, 64, 64, 3], "data": [[7] * (64 * 64 * 3)]}
    (output,) = client.post("/v2/models/beach/infer", json={"inputs": [pixels]}).json()["outputs"]
    assert output["shape"] == [1, 64, 64]


@pytest.mark.parametrize(
    ("more", "count", "sentence"),
    [
        ({}, 2, "the images differ in size, and so do their masks: send one in a request"),
        ({"outputs": [{"name": "labels"}]}, 1, "unknown output 'labels': ask for mask"),
        (
            {"outputs": [{"name": "mask", "parameters": {"classification": 2}}]},
            1,
            "classification=2 of mask does not fit: leave it out",
        ),
    ],
)
def test_what_masks_do_not_have_is_one_sentence(client, photos, more, count, sentence):
    answer = infer(client, *photos[0][:count], **more)
    assert (answer.status_code, answer.json()) == (400, {"error": sentence})


def test_numbers_that_are_not_finite_are_the_service_s_fault(client, photos, monkeypatch):
    monkeypatch.setattr(
        "visprompt.models.bank.Bank.__call__", lambda *_: [torch.full((3, 64, 64), torch.nan)]
    )
    answer = post(client, photos[0][0])
    assert answer.status_code == 500
    assert answer.json() == {"error": "image 1 gave no finite probabilities"}
