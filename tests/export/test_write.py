"""Exported files are read again and agree with their classifier; pairs of method, family and format."""

import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from visprompt.data.transforms import to_input
from visprompt.errors import UserError
from visprompt.export import describe, onnx_file, torch_file
from visprompt.export.check import TOLERANCE, Agreement, check
from visprompt.export.graph import Network, capture
from visprompt.export.write import FORMATS, Request, write
from visprompt.models.kind import MULTI_LABEL
from visprompt.models.methods import METHODS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"


def written(
    folder, method="vpt_deep", family="ViT", pictures=None, preprocessing=None, temperature=None, **request
):
    classifier = describe.classifier_of(method, family, **describe.options_of(method, family))
    classifier.temperature = temperature or 1.0
    state = replace(describe.state_of(classifier, **preprocessing or {}), temperature=temperature)
    images = {"split_set": "val", "images": 6, "trained_on": False} if pictures else None
    return classifier, state, write(folder, classifier, state, Request(**request), pictures, images)


def drawn(count=6, side=40):
    draw = np.random.default_rng(1)
    return [(draw.integers(0, 256, (side, side + 9, 3), dtype=np.uint8), i % 3) for i in range(count)]


def table():
    """The page's table: method -> family -> the formats that work, "-" or "none"."""
    rows = PAGE.read_text().split(describe._START)[1].split("\n\n")[0].splitlines()
    families, _, *lines = ([cell.strip() for cell in row.strip(" |").split("|")] for row in rows)
    return {line[0]: dict(zip(families[1:], line[1:], strict=True)) for line in lines}


def test_rows_of_the_page_are_kept_and_new_methods_get_one(monkeypatch):
    page = PAGE.read_text()
    made = []

    def cell(method, family, reasons):
        made.append((method, family))
        reasons.append("a new reason")
        return f"onnx [{len(reasons)}]"

    monkeypatch.setattr(describe, "cell", cell)
    assert describe.with_table(page, describe.table(page)) == page
    row = next(line for line in page.splitlines() if line.startswith("| lora |"))
    without = page.replace(f"{row}\n", "")
    known = len(describe.known(page)[1])
    lines = describe.table(without).splitlines()
    assert made == [("lora", family) for family in describe.FAMILIES]
    assert f"| lora | onnx [{known + 1}] | onnx [{known + 2}] | onnx [{known + 3}] |" in lines
    assert lines[-1] == f"{known + 3}. a new reason"


def _formats(cell):
    return re.sub(r" \[\d+\]| \(pad\)", "", cell).split(", ")


def test_an_onnx_file_takes_any_batch_and_says_what_it_takes(tmp_path):
    classifier, state, card = written(tmp_path, to="onnx", temperature=0.25)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "export.json"}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(each.name, each.shape) for each in session.get_inputs()] == [("images", ["batch", 3, 32, 32])]
    for count in (1, 7):
        images = torch.randn(count, 3, 32, 32)
        logits, probabilities = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = classifier(images)
        assert np.abs(logits - expected.numpy()).max() < 1e-5 * expected.abs().max()
        assert np.allclose(probabilities, (expected / 0.25).softmax(1).numpy(), atol=1e-6)
    about = json.loads(session.get_modelmeta().custom_metadata_map["visprompt"])
    assert about["preprocessing"] == state.preprocessing
    assert (about["class_names"], about["temperature"]) == (["a", "b", "c"], 0.25)
    assert card["agreement"]["error"] < 1e-5
    assert json.loads((tmp_path / "export.json").read_text())["agreement"] == card["agreement"]
    content = (tmp_path / "model.onnx").read_bytes()
    assert not re.search(rb"\.py\b|site-packages", content), "no paths of the machine that exported"


@pytest.mark.slow
def test_what_prompts_alone_decide_is_constant_in_the_graph(tmp_path):
    """The keys and values of deep prompts are stored: no layer more than in the graph without prompts."""
    counts = {}
    for method in ("linear", "vpt_deep"):
        classifier = describe.classifier_of(method, "ViT")
        state = describe.state_of(classifier)
        program = capture(Network(classifier, state.preprocessing, in_graph=False))
        targets = [str(node.target) for node in program.graph.nodes]
        counts[method] = [targets.count(f"aten.{name}.default") for name in ("linear", "layer_norm")]
        assert {name for name in program.state_dict if "prompts" in name} == set()
    # without prompts timm's own block runs, which computes all outputs
    assert counts["vpt_deep"] == counts["linear"]


@pytest.mark.slow
def test_a_torch_file_holds_no_pickle_and_is_read_again(tmp_path):
    classifier, _, card = written(tmp_path, to="torch")
    assert card["agreement"]["error"] < 1e-5
    with zipfile.ZipFile(tmp_path / torch_file.FILE) as archive:
        pickles = [entry for entry in archive.infolist() if entry.filename.endswith((".pt", ".pkl"))]
        assert [entry.file_size for entry in pickles if entry.file_size] == []
        assert b"site-packages" not in archive.read("model/models/model.json")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(torch_file.runner(tmp_path)(images)[0], classifier(images), atol=1e-5)


def test_images_of_several_classes_are_compared_by_their_kind(tmp_path):
    """A file of timm gives logits; softmax would decide otherwise than each class's own probability."""
    classifier = describe.classifier_of("lora", "ViT")
    classifier.kind = MULTI_LABEL
    state = replace(describe.state_of(classifier), kind=MULTI_LABEL.name)
    pictures = [(picture, [1, 1, number % 2]) for number, (picture, _) in enumerate(drawn())]
    images = {"split_set": "val", "images": 6, "trained_on": False}
    card = write(tmp_path / "timm", classifier, state, Request(to="timm"), lambda: pictures, images)
    assert card["agreement"]["same"] == 6


def test_a_method_that_merges_is_a_folder_of_timm(tmp_path):
    _, _, card = written(tmp_path, "lora", to="timm", pictures=drawn)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "export.json"}
    assert (card["agreement"]["images"], card["agreement"]["same"]) == (6, 6)


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(
        UserError, match="VPT tunes more than weights of the backbone, so it cannot be merged"
    ):
        written(tmp_path, to="timm")
    with pytest.raises(UserError, match=r"timm has no word for preprocessing\.resampling=tf1"):
        written(tmp_path, "bias", to="timm", preprocessing={"resampling": "tf1"})
    with pytest.raises(UserError, match="quantize=int8 changes the accuracy, which is measured on"):
        written(tmp_path, to="onnx", quantize="int8")
    for wrong, sentence in {
        ("tf", False, None): "unknown format 'tf'",
        ("onnx", False, "int4"): "unknown quantize 'int4'",
        ("torch", False, "int8"): "quantize=int8 is for to=onnx, and this is to=torch",
        ("timm", True, None): "include_preprocessing=true is not for to=timm",
    }.items():
        with pytest.raises(UserError, match=re.escape(sentence)):
            Request(to=wrong[0], include_preprocessing=wrong[1], quantize=wrong[2])


def test_a_file_that_answers_differently_is_refused():
    check(Agreement(8, TOLERANCE, 5, 5), "the file")
    with pytest.raises(UserError, match=r"relative error 1.0e-02 of the logits\): it is not written"):
        check(Agreement(8, 1e-2), "the file")
    with pytest.raises(UserError, match="relative error nan"):
        check(Agreement(8, float("nan")), "the file")
    with pytest.raises(UserError, match="gives 1 of 200 validation images another class"):
        check(Agreement(8, 0.0, 200, 199), "the file")


def test_a_forward_that_depends_on_the_batch_size_is_not_written_with_a_fixed_one(monkeypatch):
    classifier = describe.classifier_of("vpt_deep", "ViT")
    forward = classifier.method.tokens
    monkeypatch.setattr(
        classifier.method, "tokens", lambda b, x, *a: forward(b, x, *a).expand(len(x), -1, -1)
    )
    with pytest.raises(UserError, match="VPT on this backbone cannot be captured as a graph"):
        capture(Network(classifier, describe.state_of(classifier).preprocessing, in_graph=False))


@pytest.mark.slow
def test_int8_is_measured_and_leaves_prompts_and_head_as_they_are(tmp_path):
    _, _, card = written(tmp_path, "lora", to="onnx", quantize="int8", pictures=drawn)
    measured, before = card["quantized"], card["agreement"]
    assert measured["bytes"] < measured["bytes_before"]
    assert measured["change_of_accuracy"] == measured["accuracy"] - before["of_classifier"]
    model = onnx.load(tmp_path / onnx_file.FILE)
    kinds = [node.op_type for node in model.graph.node]
    # two blocks: qkv, proj and two layers of the MLP; the last block's queries and keys apart
    assert kinds.count("MatMulInteger") == measured["matrices"] == 9
    # the head stays as it was: one product, which ONNX Runtime may write as two nodes
    made = {node.output[0]: node for node in model.graph.node}
    (last,) = [node for node in model.graph.node if "classifier.head.bias" in node.input]
    assert last.op_type == "Gemm" or made[last.input[0]].op_type == "MatMul"
    with pytest.raises(UserError, match="and this backbone has none: leave it out"):
        onnx_file.quantise(tmp_path, [])


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "torch"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"resize": "short_side", "short_side": 37, "interpolation": "bicubic"}, {"resampling": "tf1"}],
)
def test_a_graph_with_its_preprocessing_takes_pictures_of_any_size(tmp_path, to, settings):
    classifier, state, card = written(
        tmp_path, to=to, include_preprocessing=True, pictures=drawn, preprocessing=settings
    )
    assert (card["agreement"]["error"] < 1e-5, card["agreement"]["same"]) == (True, 6)
    run = {"onnx": onnx_file, "torch": torch_file}[to].runner(tmp_path)
    for height, width in [(1, 9), (32, 32), (33, 500), (64, 48)]:
        picture = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
        with torch.no_grad():
            expected = classifier(to_input(picture, state.preprocessing)[None])
        got = run(torch.from_numpy(picture)[None])[0]
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "family"),
    [
        *[("vpt_shallow", "Swin"), ("full", "ConvNeXt"), ("vapt", "ViT"), ("tcpa", "ViT")],
        *[("vpt_deep", "EVA-02"), ("bias", "ResNet")],
    ],
)
def test_a_choice_of_pairs_works_as_the_page_says(method, family):
    cell = describe.cell(method, family, [])
    if family in describe.FAMILIES:
        assert _formats(cell) == _formats(table()[method][family])
    assert cell.startswith("onnx, torch")


def test_the_page_has_every_method_and_a_reason_for_what_is_missing():
    found = table()
    assert list(found) == list(METHODS)
    for method, row in found.items():
        assert list(row) == list(describe.FAMILIES)
        for family, cell in row.items():
            works = describe.options_of(method, family) is not None
            assert (cell != "-") == works, (method, family)
            assert set(_formats(cell)) <= {*FORMATS, "-", "none"}
            assert ("[" in cell) == (works and "timm" not in _formats(cell)), "a reason for what is missing"


@pytest.mark.endurance
@pytest.mark.timeout(7200)
def test_the_table_is_made_by_exporting_every_pair():
    assert describe.with_table(PAGE.read_text(), describe.table()) == PAGE.read_text(), "run make docs"
