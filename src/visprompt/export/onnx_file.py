"""Write a graph as an ONNX file, read it again with onnxruntime, and store its weights in 8 bits."""

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from visprompt.errors import UserError
from visprompt.export.check import Runner
from visprompt.export.graph import OUTPUTS, Network

FILE = "model.onnx"
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_SIDE_FILE = 1_800_000_000  # bytes of weights above which they go to a side file: protobuf ends at 2 GB
_KEY = "visprompt"  # of the metadata in the file
_VIEWS = ("permute", "transpose", "slice", "select", "view", "reshape", "unsqueeze", "t", "unflatten")


def check_installed() -> None:
    """Refuse to export where the packages of the extra `export` are missing.

    Raises:
        UserError: The message says how to install them.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(
            f"to=onnx needs the package {missing[0]}: install it with pip install 'visprompt[export]', or in "
            "this repository with make setup"
        )


def write(network: Network, program: ExportedProgram, folder: Path, about: Mapping[str, Any]) -> list[str]:
    """Write `model.onnx`; weights of more than 1.8 GB go to `model.onnx.data` beside it.

    Args:
        network: What was captured.
        program: Its graph.
        folder: An existing folder.
        about: Metadata that the file carries as JSON, under the key "visprompt".

    Returns:
        The names of the nodes that `quantise` may change: matrix products with weights of the backbone.
    """
    with _quiet():
        written: Any = torch.onnx.export(
            program,
            input_names=[network.input_name],
            output_names=list(OUTPUTS),
            dynamo=True,
            verbose=False,
        )
    names = _axis_names(network, written.model)
    values = [*written.model.graph.inputs]
    values += [value for node in written.model.graph for value in node.outputs]
    for value in values:
        for axis, side in enumerate(value.shape or ()):
            if str(getattr(side, "value", None)) in names:
                value.shape[axis] = names[side.value]
    of_backbone, products = _products(program), []
    for node in written.model.graph:
        origin = node.metadata_props.get("pkg.torch.onnx.fx_node", "").partition(" ")[0].removeprefix("%")
        if node.op_type == "MatMul" and origin in of_backbone and node.inputs[1].is_initializer():
            products.append(node.name)
        node.metadata_props.clear()  # the exporter's remarks, with paths of this machine
    written.model.metadata_props[_KEY] = json.dumps(about)
    written.save(folder / FILE, external_data=_nbytes(program) > _SIDE_FILE)
    return products


def _axis_names(network: Network, model: Any) -> dict[str, str]:
    """Return what the exporter calls the dynamic axes -> what they are."""
    shape, (axes,) = model.graph.inputs[0].shape, network.dynamic()
    return {str(shape[axis].value): dim.__name__ for axis, dim in axes.items()}


def _nbytes(program: ExportedProgram) -> int:
    return sum(tensor.nbytes for tensor in program.state_dict.values())


def runner(folder: Path) -> Runner:
    """Return a function that computes with the file, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are about its own optimisations
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())

    def run(inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits, probabilities = session.run(list(OUTPUTS), {name: inputs.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(probabilities)

    return run


def quantise(folder: Path, products: Sequence[str]) -> None:
    """Replace the file by one in which matrices of the backbone are 8-bit integers, with scales by column.

    Activations are quantised when the file runs ("dynamic"), so no images are needed. Prompts, the layers of
    the method, convolutions and the head stay in float32.

    Args:
        folder: The file's folder.
        products: A result of `write`.

    Raises:
        UserError: There are no such matrices.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if not products:
        raise UserError(
            "quantize=int8 stores the matrices of linear layers in 8 bits, and this backbone has none: "
            "leave it out"
        )
    side_file = folder / f"{FILE}.data"
    large = side_file.exists()
    with TemporaryDirectory(dir=folder) as temporary, _quiet():
        quantize_dynamic(
            folder / FILE,
            Path(temporary) / FILE,
            nodes_to_quantize=list(products),
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=large,
        )
        side_file.unlink(missing_ok=True)
        for file in Path(temporary).iterdir():
            file.replace(folder / file.name)


def _products(program: ExportedProgram) -> set[str]:
    """Return the names of the graph's linear layers whose weight is one of the backbone, or a part of one."""
    parameters = program.graph_signature.inputs_to_parameters
    found = set()
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.linear.default:
            continue
        weight: Any = node.args[1]
        while isinstance(weight, Node) and weight.op == "call_function" and _is_view(weight):
            weight = weight.args[0]
        if parameters.get(weight.name, "").startswith("classifier.backbone."):
            found.add(node.name)
    return found


def _is_view(node: Node) -> bool:
    return str(node.target).split(".")[1] in _VIEWS


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporter and the quantiser print about their own steps."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
