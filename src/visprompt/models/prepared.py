"""What a task adds to a pass of the backbone, computed once for all its images."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visprompt.models.backbones.family import Family
from visprompt.models.backbones.token_family import TokenFamily
from visprompt.models.classifier import Classifier
from visprompt.models.contract import Flow, Method
from visprompt.models.layers import Wrapped
from visprompt.models.methods.baselines import MLPHead
from visprompt.models.methods.locations import MoreChannels
from visprompt.models.sharing import Rebiased, rebiased_layers, wrapped_layers
from visprompt.models.task_kind import TaskKind


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a task adds to a pass of the backbone.

    Attributes:
        head: Features [B, width] -> logits [B, C].
        method: The method, if it computes something for each image.
        pool: Which outputs of the last block are pooled, see `Method.pool`.
        flow: What happens to the task's prompts before each block.
        rows: For each block pairs of keys and values that all images share, [t, 2, heads, head_dim], or None.
        prompts: By block, prompts [p, width] that enter the sequence there and are the same for all images.
        counts: Number of the task's prompts in the sequence of each block.
        changes: Names of the functions among `pixels`, `shift` and `features` that change something.
        layers: The layers that the method has wrapped, by path.
        alone: The classifier, if the task cannot share a pass; then the rest is empty.
    """

    head: nn.Module | None = None
    method: Method | None = None
    pool: str | None = None
    flow: tuple[Flow, ...] = ()
    rows: tuple[Tensor | None, ...] = ()
    prompts: Mapping[int, Tensor] | None = None
    counts: tuple[int, ...] = ()
    changes: frozenset[str] = frozenset()
    layers: Mapping[str, Wrapped] | None = None
    alone: Classifier | None = None

    def tensors(self) -> Iterable[Tensor]:
        """Yield the tensors that the task owns."""
        yield from (rows for rows in self.rows if rows is not None)
        yield from (self.prompts or {}).values()
        yield from (layer.bias_delta for layer in (self.layers or {}).values() if isinstance(layer, Rebiased))
        alone = self.alone
        for module in (self.head, self.method, alone and alone.head, alone and alone.method):
            if module is not None:
                yield from module.parameters()
                yield from module.buffers()
        if alone is not None:
            names = [name for name in alone.tuned_tensor_names() if name.startswith("backbone.")]
            yield from (tensor for name, tensor in alone.state_dict().items() if name in names)


@dataclass(frozen=True, eq=False)
class Task:
    """A tuned state that a bank holds.

    Attributes:
        name: Its name in the bank.
        class_names: Names of the classes, in the order of the logits.
        preprocessing: How pictures become the backbone's input, as the state says.
        method: The method's name and options.
        kind: The kind of the labels.
        nbytes: Memory of its tensors: what the task adds to the backbone.
        prepared: Its tensors, and whether its images share a pass with those of other tasks.
        temperature: What its logits are divided by for probabilities.
    """

    name: str
    class_names: tuple[str, ...]
    preprocessing: Mapping[str, Any]
    method: Mapping[str, Any]
    kind: TaskKind
    nbytes: int
    prepared: Prepared
    temperature: float = 1.0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities [..., C] of its logits, see `Classifier.probabilities`."""
        return self.kind.probabilities(logits, self.temperature)

    @property
    def shares(self) -> bool:
        """Whether its images share a pass of the backbone with those of other tasks."""
        return self.prepared.alone is None


def backbone_only(backbone: Family) -> Prepared:
    """Return a task without prompts and head, whose logits are the backbone's features."""
    blocks = backbone.num_blocks
    flow = (Flow.KEEP,) * blocks
    return Prepared(nn.Identity(), flow=flow, rows=(None,) * blocks, counts=(0,) * blocks)


@torch.no_grad()
def prepare(classifier: Classifier, shared: Family) -> Prepared:
    """Compute what does not depend on the image, once.

    Args:
        classifier: A task's classifier in evaluation mode, on a shared copy of the backbone.
        shared: The backbone itself.
    """
    backbone: Any = classifier.backbone
    method = classifier.method
    flow = method.token_flow()
    method.freeze()
    changes = _changes(backbone, method)
    rebiased, wrapped = rebiased_layers(classifier, shared), wrapped_layers(backbone)
    # a dense head reads maps of blocks, and its images have other sizes: it shares the weights alone
    mixes = not classifier.kind.dense and _mixes(classifier, changes)
    if rebiased is None or (rebiased and wrapped) or not mixes:
        return Prepared(alone=classifier)
    layers = rebiased | wrapped
    rows: list[Tensor | None] = []
    prompts: dict[int, Tensor] = {}
    counts: list[int] = []
    dynamic = bool(layers or changes or method.places)
    for i in range(backbone.num_blocks):
        own = [] if (given := method.keys_values(i)) is None else [torch.stack(given)]
        count = counts[-1] if counts and flow[i] is Flow.KEEP else 0
        if flow[i] in (Flow.ENTER, Flow.MIX):
            entering = None if flow[i] is Flow.MIX else method.tokens(i, _blank(backbone, i))[0]
            count = counts[-1] if entering is None else len(entering)
            if entering is None or method.reads_image:
                dynamic = True
            elif _are_read(backbone, method, i):
                prompts[i] = entering.clone()
            else:
                k, v = backbone.keys_values(i, entering[None].to(_blank(backbone, i).dtype))
                own.append(torch.stack([k[0], v[0]]))
                count = 0
        counts.append(count)
        # [2, heads, t, head_dim] -> [t, 2, heads, head_dim]: an image's rows are gathered by their first axis
        rows.append(torch.cat(own, dim=2).permute(2, 0, 1, 3).contiguous() if own else None)
    if not layers:
        method.attach(shared)  # so that nothing keeps the copy
    head = classifier.head
    return Prepared(
        head.merged() if isinstance(head, MLPHead) else head,
        method if dynamic else None,
        method.pool,
        flow,
        tuple(rows),
        prompts,
        tuple(counts),
        changes,
        layers,
    )


def _mixes(classifier: Classifier, changes: frozenset[str]) -> bool:
    """Return whether images of a task may be in one pass with images of others."""
    backbone, method = classifier.backbone, classifier.method
    foreign = any(isinstance(module, MoreChannels) for module in backbone.modules())
    if foreign or not method.mixes or "size" in changes:
        return False
    enters = any(flow is not Flow.KEEP for flow in method.token_flow())
    if enters or any(method.keys_values(i) is not None for i in range(backbone.num_blocks)):  # type: ignore[arg-type]  # a number
        return isinstance(backbone, TokenFamily) and all(map(backbone.is_proven, backbone.blocks))
    return True


def _changes(backbone: Family, method: Method) -> frozenset[str]:
    """Return which functions change what they are given; "size" if the images get another size."""
    like = next(backbone.parameters())
    images = torch.zeros(1, 3, *backbone.own_size, dtype=like.dtype, device=like.device)
    changed = method.pixels(images)
    found = {"pixels"} if changed is not images else set()
    found |= {"size"} if changed.shape != images.shape else set()
    tokens = isinstance(backbone, TokenFamily)
    blanks = [_blank(backbone, i) for i in range(backbone.num_blocks)] if tokens else []
    if any(method.shift(i, blank) is not blank for i, blank in enumerate(blanks)):
        found.add("shift")
    pooled = images.new_zeros(1, backbone.width)
    if method.features(pooled, images) is not pooled:
        found.add("features")
    return frozenset(found)


def _blank(backbone: Family, block: int) -> Tensor:
    """Return image tokens [1, n, width] of a block that are zeros."""
    like, (height, width) = next(backbone.parameters()), backbone.grids[block]
    return like.new_zeros(1, backbone.num_prefix + height * width, backbone.widths[block])


def _are_read(backbone: Any, method: Method, block: int) -> bool:
    """Return whether the outputs of the prompts in a block are read."""
    if block + 1 == backbone.num_blocks:
        return bool(backbone.pooled_rows(_blank(backbone, block).shape[1], method.pool)[1])
    return method.token_flow()[block + 1] in (Flow.KEEP, Flow.MIX)
