"""Write a classifier in one of the formats, and compare what was written with it before it is kept."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from visprompt.errors import UserError, unknown
from visprompt.export import onnx_file, timm_folder, torch_file
from visprompt.export.check import Agreement, Picture, Runner, check, compare
from visprompt.export.graph import Network, capture
from visprompt.files import write_record
from visprompt.models.classifier import Classifier
from visprompt.models.merge import merge
from visprompt.models.tuned_state import TunedState
from visprompt.models.windows import stride_of

FORMATS = ("onnx", "torch", "timm")
CARD = "export.json"
Pictures = Callable[[], Iterable[Picture]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be written.

    Attributes:
        to: One of `FORMATS`.
        include_preprocessing: Whether the file takes decoded pictures; if not, it takes normalised images,
            and the card says how to make them.
        quantize: "int8" stores matrices of the backbone in 8 bits; None leaves all weights as they are.

    Raises:
        UserError: A word is unknown, or two of them cannot be combined.
    """

    to: str
    include_preprocessing: bool = False
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise unknown("format", self.to, FORMATS)
        if self.quantize not in (None, "int8"):
            raise unknown("quantize", self.quantize, ["int8", "null"])
        if self.quantize and self.to != "onnx":
            raise UserError(
                f"quantize=int8 is for to=onnx, and this is to={self.to}: leave it out, or give to=onnx"
            )
        if self.include_preprocessing and self.to == "timm":
            raise UserError(
                "include_preprocessing=true is not for to=timm, whose folder holds weights and no graph: "
                "leave it out, or give to=onnx or to=torch"
            )


def write(
    folder: Path,
    classifier: Classifier,
    state: TunedState,
    request: Request,
    pictures: Pictures | None = None,
    of_pictures: Mapping[str, Any] | None = None,
    program: ExportedProgram | None = None,
) -> dict[str, Any]:
    """Write a classifier to a folder, compare it, and write the card `export.json` beside it.

    Args:
        folder: An existing folder; the caller removes it if this function fails.
        classifier: The classifier; it is put in evaluation mode.
        state: The tuned state that it was built from.
        request: What to write.
        pictures: Returns the validation images of its task; None without any.
        of_pictures: What the card says about these images.
        program: The classifier's graph, if it was captured before.

    Returns:
        The card's content.

    Raises:
        UserError: The classifier has no such form, or the file answers differently from it.
    """
    if request.quantize and pictures is None:
        raise UserError(
            "quantize=int8 changes the accuracy, which is measured on the task's validation images, and "
            "there are none here: say where they are with data.root=... or paths.data_dir=..., or leave it "
            "out"
        )
    if request.include_preprocessing and state.preprocessing["resize"] == "windows":
        raise UserError(
            "include_preprocessing=true is not for a run whose images are covered by sliding windows: leave "
            "it out, and give the file windows as its export.json says"
        )
    classifier.eval().requires_grad_(False)
    about = _about(state, request)
    products: list[str] = []
    if request.to == "timm":
        timm_folder.write(merge(classifier), folder, state.preprocessing, state.class_names)
    else:
        network = Network(classifier, state.preprocessing, request.include_preprocessing)
        program = program or capture(network)
        if request.to == "onnx":
            products = onnx_file.write(network, program, folder, about)
        else:
            torch_file.write(program, folder)
    modules = {"onnx": onnx_file, "torch": torch_file, "timm": timm_folder}
    open_again: Callable[[Path], Runner] = modules[request.to].runner

    def compared() -> Agreement:
        images, in_graph = pictures() if pictures else (), request.include_preprocessing
        return compare(classifier, open_again(folder), state.preprocessing, in_graph, images)

    agreement = compared()
    check(agreement, f"the file of to={request.to}")
    card = about | {"agreement": asdict(agreement), "validation": of_pictures}
    if request.quantize:
        before = _size(folder)
        onnx_file.quantise(folder, products)
        quantised = compared()
        card["quantized"] = {
            "weights": request.quantize,
            "matrices": len(products),
            "accuracy": quantised.accuracy,
            "change_of_accuracy": _change(quantised),
            "same": quantised.same,
            "error": quantised.error,
            "bytes": _size(folder),
            "bytes_before": before,
        }
    write_record(folder / CARD, card, indent=1)
    return card


def _change(agreement: Agreement) -> float | None:
    if agreement.accuracy is None or agreement.of_classifier is None:
        return None
    return agreement.accuracy - agreement.of_classifier


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _about(state: TunedState, request: Request) -> dict[str, Any]:
    """Return what file and card say of the classifier and its input."""
    size = state.preprocessing["size"]
    pictures = {"name": "pictures", "dtype": "uint8", "shape": ["batch", "height", "width", 3]}
    images = {"name": "images", "dtype": "float32", "shape": ["batch", 3, size, size]}
    packages = {"onnx": ("torch", "onnx"), "torch": ("torch",), "timm": ("torch", "timm")}[request.to]
    windows: dict[str, Any] = {}
    if state.preprocessing["resize"] == "windows":
        windows = {"windows": {"size": size, "stride": stride_of(size), "by": "the caller"}}
    return {
        "to": request.to,
        "task": state.task,
        "kind": state.kind,
        "method": dict(state.method),
        "backbone": dict(state.backbone),
        "class_names": list(state.class_names),
        "input": pictures if request.include_preprocessing else images,
        "outputs": ["logits"] if request.to == "timm" else ["logits", "probabilities"],
        "temperature": state.temperature,
        "preprocessing": dict(state.preprocessing),
        "preprocessing_included": request.include_preprocessing,
        **windows,
        "versions": {name: version(name) for name in (*packages, "visprompt")},
    }
