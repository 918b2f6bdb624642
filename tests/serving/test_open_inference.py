"""The Open Inference Protocol, spoken by a public client (tritonclient) and over plain HTTP."""

import base64

import numpy as np
import pytest
import tritonclient.http as triton

from helpers.service import ADMIN, BAD, expected, picture, running, write_state
from visprompt.data.sources.decoders import decoder_of
from visprompt.data.transforms import to_input
from visprompt.models.tuned_state import load_state

# a second service to start; the fast tests have one
pytestmark = pytest.mark.slow

PICTURES = [picture(seed, kind="JPEG") for seed in range(3)]


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    write_state(folder / "birds.safetensors", 1, 4)
    write_state(folder / "cars.safetensors", 2, 3)
    return folder


@pytest.fixture(scope="module")
def service(states, tmp_path_factory):
    with running(tmp_path_factory.mktemp("service"), states, "limits.images=8") as service:
        yield service


@pytest.fixture(scope="module")
def client(service):
    with triton.InferenceServerClient(service.url.removeprefix("http://")) as client:
        yield client


def encoded(contents=PICTURES, binary=True):
    """The input of a client: image files."""
    given = triton.InferInput("images", [len(contents)], "BYTES")
    given.set_data_from_numpy(np.array(contents, dtype=np.object_), binary_data=binary)
    return [given]


def test_a_client_sees_the_server_and_its_models(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("birds")
    assert client.is_model_ready("birds", "1")
    assert not client.is_model_ready("birds", "2")
    assert not client.is_model_ready("fish")
    assert client.get_server_metadata()["name"] == "visprompt"
    about = client.get_model_metadata("birds")
    assert about["inputs"] == [{"name": "images", "datatype": "BYTES", "shape": [-1]}]
    assert [out["name"] for out in about["outputs"]] == ["probabilities", "labels"]
    assert about["outputs"][0]["shape"] == [-1, 4]


@pytest.mark.parametrize("task", ["birds", "cars"])
@pytest.mark.parametrize("binary", [None, True, False])
def test_a_client_gets_the_probabilities_of_image_files(client, states, task, binary):
    names, shares = expected(states / f"{task}.safetensors", PICTURES)
    outputs = (
        None
        if binary is None
        else [triton.InferRequestedOutput(n, binary) for n in ("probabilities", "labels")]
    )
    result = client.infer(task, encoded(), outputs=outputs, request_id="mine")
    assert result.get_response()["id"] == "mine"
    assert np.abs(result.as_numpy("probabilities") - shares).max() < 1e-4
    labels = [label.decode() if isinstance(label, bytes) else label for label in result.as_numpy("labels")]
    assert labels == [names[i] for i in shares.argmax(1)]


def test_a_client_gets_the_best_classes_in_tritons_form(client, states):
    names, shares = expected(states / "birds.safetensors", PICTURES)
    wanted = [triton.InferRequestedOutput("probabilities", class_count=2)]
    texts = client.infer("birds", encoded(), outputs=wanted).as_numpy("probabilities")
    assert texts.shape == (3, 2)
    for row, share in zip(texts, shares, strict=True):
        value, place, name = row[0].decode().split(":")
        assert (int(place), name) == (share.argmax(), names[share.argmax()])
        assert float(value) == pytest.approx(share.max(), abs=1e-4)


@pytest.mark.parametrize("binary", [True, False])
def test_a_client_may_send_pixels_or_normalised_inputs(client, states, binary):
    state = load_state(states / "birds.safetensors")
    _, shares = expected(states / "birds.safetensors", PICTURES)
    pixels = np.stack([decoder_of(state.preprocessing)(content) for content in PICTURES])
    inputs = np.stack([to_input(image, state.preprocessing).numpy() for image in pixels])
    for values, kind in ((pixels, "UINT8"), (inputs, "FP32")):
        given = triton.InferInput("images", list(values.shape), kind)
        given.set_data_from_numpy(values, binary_data=binary)
        assert np.abs(client.infer("birds", [given]).as_numpy("probabilities") - shares).max() < 1e-4, kind


def test_without_the_binary_extension_image_files_are_base64(service, states):
    _, shares = expected(states / "cars.safetensors", PICTURES[:1])
    data = [base64.b64encode(PICTURES[0]).decode()]
    asked = {"inputs": [{"name": "images", "shape": [1], "datatype": "BYTES", "data": data}]}
    answer = service.post("/v2/models/cars/infer", json=asked).json()
    assert answer["model_name"] == "cars"
    assert answer["outputs"][0]["shape"] == [1, 3]
    assert answer["outputs"][0]["data"] == pytest.approx(shares[0], abs=1e-4)


def test_a_client_loads_and_unloads_with_the_admin_token(client):
    index = client.get_model_repository_index()
    assert [(m["name"], m["state"]) for m in index] == [("birds", "READY"), ("cars", "READY")]
    with pytest.raises(triton.InferenceServerException, match="admin token"):
        client.unload_model("cars")
    client.unload_model("cars", headers=ADMIN)
    assert not client.is_model_ready("cars")
    assert [m["state"] for m in client.get_model_repository_index()] == ["READY", "UNAVAILABLE"]
    with pytest.raises(triton.InferenceServerException, match="send no parameters"):
        client.load_model("cars", headers=ADMIN, config="{}")
    client.load_model("cars", headers=ADMIN)
    assert client.is_model_ready("cars")
    with pytest.raises(triton.InferenceServerException, match="unknown task 'car': did you mean cars"):
        client.load_model("car", headers=ADMIN)


def test_a_bad_image_is_the_error_of_its_request(client):
    with pytest.raises(triton.InferenceServerException, match=r"^\[400\] image 2 cannot be decoded"):
        client.infer("birds", encoded([PICTURES[0], BAD]))


def about(**changes):
    return {"inputs": [{"name": "images", "shape": [1], "datatype": "BYTES", "data": ["eA=="]} | changes]}


@pytest.mark.parametrize(
    ("asked", "status", "sentence"),
    [
        ([], 400, "is not a JSON object"),
        ({}, 400, "has not exactly one input"),
        ({"inputs": [{}, {}]}, 400, "has not exactly one input"),
        (about(name="x"), 400, "the input is named 'x': name it images"),
        (about(shape=[0]), 400, "is not a list of whole numbers above 0"),
        (about(shape=[-1]), 400, "is not a list of whole numbers above 0"),
        (about(shape="x"), 400, "is not a list of whole numbers above 0"),
        (about(shape=[9]), 413, "the request holds 9 images, more than the 8 allowed"),
        (about(shape=[2]), 400, "are not the 2 images that its shape says"),
        (about(shape=[1, 2]), 400, "has the shape [1, 2], not [images]"),
        (about(data=None), 400, "are not the 1 images"),
        (about(data=["http://127.0.0.1"]), 400, "image 1 is not base64"),
        (
            about(datatype="FP64"),
            400,
            "send BYTES [n] (image files), UINT8 [n, h, w, 3] or FP32 [n, 3, h, w]",
        ),
        (about(datatype="UINT8", shape=[1, 2, 2, 3], data=[256] * 12), 400, "are not the 12 numbers"),
        (about(datatype="UINT8", shape=[1, 2, 2, 3], data=[1] * 11), 400, "are not the 12 numbers"),
        (about(datatype="FP32", shape=[1, 3, 2, 2], data=["x"] * 12), 400, "are not the 12 numbers"),
        (
            about(datatype="FP32", shape=[1, 3, 2, 2], data=[1.0] * 12),
            400,
            "has the shape [3, 2, 2], not [3, 64, 64]",
        ),
        (about(datatype="UINT8", shape=[1, 2, 2, 4], data=[1] * 16), 400, "has the shape [2, 2, 4]"),
        (
            about(parameters={"binary_data_size": 5}),
            400,
            "binary_data_size=5 is not the 0 bytes behind the JSON",
        ),
        (
            about() | {"outputs": [{"name": "logits"}]},
            400,
            "unknown output 'logits': ask for probabilities or labels",
        ),
        (about() | {"outputs": "x"}, 400, "unknown output None"),
        (
            about() | {"outputs": [{"name": "labels"}] * 2},
            400,
            "the output labels is asked for twice: ask for it once",
        ),
        (about(datatype=[]), 400, "input images is [] of shape [1]: send BYTES [n] (image files)"),
        (about(datatype={}, shape=[1, 2, 2, 3]), 400, "input images is {} of shape"),
        (
            about() | {"outputs": [{"name": "labels", "parameters": {"classification": 2}}]},
            400,
            "classification=2 of labels does not fit",
        ),
    ],
)
def test_a_request_that_does_not_follow_the_protocol_is_refused(service, asked, status, sentence):
    answer = service.post("/v2/models/birds/infer", json=asked)
    assert (answer.status_code, sentence in answer.json()["error"]) == (status, True), answer.text


def test_lengths_of_binary_data_are_checked(service):
    for length in ("x", "-1", "999"):
        headers = {"Inference-Header-Content-Length": length}
        answer = service.post("/v2/models/birds/infer", data=b"{}", headers=headers)
        assert (answer.status_code, "is not a length within the body" in answer.text) == (400, True)
    text = b'{"inputs": [{"name": "images", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 8}}]}'
    headers = {"Inference-Header-Content-Length": str(len(text))}
    answer = service.post("/v2/models/birds/infer", data=text + b"\xff\xff\xff\x7fabcd", headers=headers)
    assert (answer.status_code, "are not the 1 images" in answer.text) == (400, True)
