"""Capture a classifier as a graph with a dynamic batch, in which everything constant is computed."""

import operator
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from visprompt.errors import UserError, in_one_line
from visprompt.export.preprocess import Preprocess
from visprompt.models.classifier import Classifier

OUTPUTS = ("logits", "probabilities")
_LARGEST = 2**15  # side of a picture


class Network(nn.Module):
    """What is exported: a classifier, with or without its preprocessing.

    Args:
        classifier: The classifier, in evaluation mode.
        preprocessing: A tuned state's `preprocessing`.
        in_graph: Whether the preprocessing is part of the graph.
    """

    def __init__(self, classifier: Classifier, preprocessing: Mapping[str, Any], in_graph: bool) -> None:
        super().__init__()
        self.classifier = classifier
        self.preprocess = Preprocess(preprocessing) if in_graph else None
        self.size = int(preprocessing["size"])

    @property
    def input_name(self) -> str:
        """Name of the input: "pictures", uint8 [B, h, w, 3]; or "images", float32 [B, 3, size, size]."""
        return "images" if self.preprocess is None else "pictures"

    def example(self) -> tuple[Tensor]:
        """Return an input that the graph can be captured with."""
        if self.preprocess is None:
            return (torch.zeros(2, 3, self.size, self.size),)
        return (torch.zeros(2, self.size + 3, self.size + 5, 3, dtype=torch.uint8),)

    def dynamic(self) -> tuple[dict[int, Any]]:
        """Return which axes of the input may have any length."""
        axes: dict[int, Any] = {0: Dim("batch", min=1)}
        if self.preprocess is not None:
            axes |= {1: Dim("height", min=1, max=_LARGEST), 2: Dim("width", min=1, max=_LARGEST)}
        return (axes,)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and probabilities, each [B, C], or of a dense kind [B, C, size, size]."""
        images = inputs if self.preprocess is None else self.preprocess(inputs)
        logits = self.classifier(images)
        return logits, self.classifier.probabilities(logits)


def capture(network: Network) -> ExportedProgram:
    """Capture a network by `torch.export`, with what the tuned values alone decide computed once.

    Args:
        network: The network; its parameters are not changed.

    Returns:
        The program, in which prompts and all that is computed from them are constants.

    Raises:
        UserError: The forward depends on the values or on the batch size in a way that a graph cannot hold.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks about its own internals
            program = torch.export.export(network, network.example(), dynamic_shapes=network.dynamic())
            if any(map(_is_in_place, program.graph.nodes)):
                program = program.run_decompositions({})  # then each node has one value
            folded = _folded(program.module(check_guards=False))
            program = torch.export.export(folded, network.example(), dynamic_shapes=network.dynamic())
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds of exceptions
        method = type(network.classifier.method).__name__
        raise UserError(
            f"{method} on this backbone cannot be captured as a graph ({in_one_line(error)[:300]}): "
            "keep the tuned state with the backbone"
        ) from error
    for node in program.graph.nodes:  # or the files would hold paths of this machine
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            node.meta.pop(name, None)
    return program


def _folded(module: GraphModule) -> GraphModule:
    """Replace every result that depends on no input by a constant.

    Views of a parameter are left as they are: a constant would only repeat its memory.
    """
    graph = module.graph
    values: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(module)
        elif _is_constant(node, values):
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    stored = {v.untyped_storage().data_ptr() for node, v in values.items() if node.op == "get_attr"}
    for number, (node, value) in enumerate(values.items()):
        read = any(user not in values for user in node.users)
        if not read or not isinstance(value, Tensor) or value.untyped_storage().data_ptr() in stored:
            continue
        name = f"constant_{number}"
        module.register_buffer(name, value.detach().clone().contiguous())
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(name))
    for node in reversed(values):  # torch keeps checks of a tensor's type, which return nothing
        if not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return GraphModule({name: operator.attrgetter(name)(module) for name in used}, graph)


def _is_constant(node: Node, values: Mapping[Node, Any]) -> bool:
    """Return whether a node computes the same in every call."""
    if node.op != "call_function" or not all(each in values for each in node.all_input_nodes):
        return False
    is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    idle_dropout = node.target is torch.ops.aten.dropout.default and node.args[2] is False
    return idle_dropout or not is_random


def _is_in_place(node: Node) -> bool:
    """Return whether a node changes a tensor that it is given."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))
