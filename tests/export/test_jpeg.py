"""From the bytes of a JPEG to probabilities: the exported file and the classifier give the same."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from visprompt.data.sources.decoders import decoder_of
from visprompt.data.transforms import to_input
from visprompt.export import describe, timm_folder
from visprompt.export.write import Request, write

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"


@pytest.fixture
def photo(tmp_path):
    """A JPEG that the camera held sideways."""
    draw = np.random.default_rng(0)
    small = Image.fromarray(draw.integers(0, 256, (9, 13, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    small.resize((120, 90), Image.Resampling.BICUBIC).save(tmp_path / "photo.jpg", quality=85, exif=exif)
    return tmp_path / "photo.jpg"


def exported(folder, method="vpt_deep", preprocessing=None, **request):
    folder.mkdir()
    classifier = describe.classifier_of(method, "ViT")
    state = describe.state_of(classifier, **preprocessing or {})
    write(folder, classifier, state, Request(**request))
    return classifier, state


def expected(classifier, state, photo):
    picture = decoder_of(state.preprocessing)(photo)
    with torch.no_grad():
        return classifier(to_input(picture, state.preprocessing)[None]).softmax(1)[0].numpy(), picture


@pytest.mark.parametrize("interpolation", ["bilinear", pytest.param("bicubic", marks=pytest.mark.slow)])
def test_the_page_s_lines_without_visprompt_give_the_run_s_probabilities(
    tmp_path, photo, interpolation, capsys
):
    classifier, state = exported(tmp_path / "out", preprocessing={"interpolation": interpolation}, to="onnx")
    (lines,) = (
        block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "onnx" in block
    )
    lines = lines.replace("FOLDER", str(tmp_path / "out")).replace("IMAGE", str(photo))
    assert "visprompt" not in lines.replace(str(tmp_path), "")
    names: dict = {}
    exec(lines, names)  # the page's own lines
    wanted, _ = expected(classifier, state, photo)
    assert np.allclose(names["probabilities"][0], wanted, atol=1e-6)
    assert capsys.readouterr().out.split() == [state.class_names[wanted.argmax()]]


@pytest.mark.slow
@pytest.mark.parametrize("resize", [{}, {"resize": "short_side", "short_side": 41}])
def test_a_graph_with_its_preprocessing_takes_the_decoded_picture(tmp_path, photo, resize):
    import onnxruntime

    classifier, state = exported(
        tmp_path / "out", preprocessing=resize, to="onnx", include_preprocessing=True
    )
    wanted, picture = expected(classifier, state, photo)
    assert picture.shape == (120, 90, 3), "upright"
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    assert np.allclose(session.run(None, {"pictures": picture[None]})[1][0], wanted, atol=1e-6)


@pytest.mark.parametrize(
    "how", [{}, {"interpolation": "bicubic"}, {"resize": "short_side", "short_side": 41}], ids=str
)
def test_timm_s_own_transform_makes_the_same_pixels(tmp_path, photo, how):
    classifier, state = exported(tmp_path / "out", "lora", preprocessing=how, to="timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    wanted, picture = expected(classifier, state, photo)
    pixels = transform(Image.open(io.BytesIO(_as_png(picture))))
    assert torch.equal(pixels, to_input(picture, state.preprocessing))
    with torch.no_grad():
        assert np.allclose(model(pixels[None]).softmax(1)[0].numpy(), wanted, atol=1e-6)


def _as_png(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("size", [32, 64, 192, 224, 256, 336, 384, 448, 512])
@pytest.mark.parametrize("more", [0, 1, 7, 9, 32, 37, 73])
def test_timm_s_share_of_the_short_side_is_exact(size, more):
    how = {"size": size, "short_side": size + more, "resize": "short_side", "resampling": "pillow"}
    how |= {"interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    assert int(size / timm_folder.data_config(how)["crop_pct"]) == size + more
