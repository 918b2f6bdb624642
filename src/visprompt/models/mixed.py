"""One method for a batch of images of several tasks, so that they share a pass of the backbone.

Images are sorted by task, so a task has one span of a batch. When a task is prepared, two things are computed
once for all its images:

- the keys and values of prompts that all its images share and whose outputs nothing reads (VPT-deep, E2VPT,
  VFPT, low-rank prompts): a batch gathers rows, and no request projects a prompt;
- prompts that all its images share and whose outputs are read (VPT-shallow): they stand in the sequence.

Prompts of unequal number are filled up with zeros to the largest number, and the places that are filled are
hidden from the attention, which is one call for each block. What depends on the image (prompts of VAPT, the
gates of gated prompts, adapters, low-rank updates) is computed span by span, from the task's own method.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from visprompt.models.backbones.family import Family
from visprompt.models.backbones.token_family import TokenFamily
from visprompt.models.contract import Flow, Method, Place
from visprompt.models.prepared import Prepared
from visprompt.models.sharing import Batch, Span


class Mixed(Method):
    """The method of a batch whose images have several tasks.

    Args:
        backbone: The backbone.
        parts: For each span of the batch its task, in the order of the batch.
        pad_always: Whether rows are padded and masked in a batch of one task too, so that compiled blocks get
            the same kinds of inputs whatever the batch.
    """

    def __init__(
        self, backbone: Family, parts: Sequence[tuple[Span, Prepared]], pad_always: bool = False
    ) -> None:
        super().__init__(backbone)
        self._pad_always = pad_always
        self._parts, self._device = parts, next(backbone.parameters()).device
        self._sizes = [stop - start for (start, stop), _ in parts]
        methods = [task.method for _, task in parts if task.method is not None]
        self.places = frozenset().union(*(method.places for method in methods))  # type: ignore[misc]  # of this batch
        self.tokenwise = all(method.tokenwise for method in methods)  # type: ignore[misc]  # of this batch
        self.fixed_size = any(method.fixed_size for method in methods)
        self._counts = [[task.counts[i] for _, task in parts] for i in range(self.num_blocks)]
        self._num_image = 0  # image tokens in the present block
        self._gathered: tuple[int, tuple[Tensor, Tensor] | None] = (-1, None)  # the last block's rows
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def pixels(self, images: Tensor) -> Tensor:
        """Return the images [B, 3, H, W], each changed by its task."""
        return self._each("pixels", images, lambda method, part, _: method.pixels(part))

    def shift(self, block: int, x: Tensor) -> Tensor:
        """Return the image tokens [B, n, width], each image's changed by its task."""
        self._num_image = x.shape[1]
        return self._each("shift", x, lambda method, part, _: method.shift(block, part))

    def features(self, pooled: Tensor, images: Tensor) -> Tensor:
        """Return the features [B, width], each changed by its task."""
        return self._each(
            "features", pooled, lambda method, part, where: method.features(part, images[where])
        )

    def token_flow(self) -> tuple[Flow, ...]:
        """Return the flow of all tasks' prompts as one block of tokens."""
        flow = []
        for i, counts in enumerate(self._counts):
            carried = any(
                count and task.flow[i] is not Flow.ENTER
                for count, (_, task) in zip(counts, self._parts, strict=True)
            )
            flow.append(Flow.MIX if carried else Flow.ENTER if any(counts) else Flow.DROP)
        return tuple(flow)

    def tokens(self, block: int, x: Tensor, last: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the prompts of all images in a block, [B, p, width], zeros where an image has fewer."""
        out = x.new_zeros(len(x), max(self._counts[block]), x.shape[-1])
        for ((start, stop), task), count in zip(self._parts, self._counts[block], strict=True):
            if not count:
                continue
            own = None if last is None else tuple(part[start:stop, :count] for part in last)
            if task.flow[block] is Flow.KEEP:
                assert own is not None
                values = own[1]
            elif task.prompts and block in task.prompts:
                values = task.prompts[block]
            else:
                assert task.method is not None
                mixes = task.flow[block] is Flow.MIX
                values = task.method.tokens(block, x[start:stop], own if mixes else None)  # type: ignore[arg-type]  # a pair
            out[start:stop, :count] = values
        return out

    def keys_values(self, block: int) -> tuple[Tensor, Tensor] | None:
        """Return the rows of all images, each [B, heads, t, head_dim]; zeros where an image has fewer."""
        if self._gathered[0] != block:  # it is asked for twice
            self._gathered = block, self._gather([task.rows[block] for _, task in self._parts])
        return self._gathered[1]

    def _gather(self, rows: Sequence[Tensor | None]) -> tuple[Tensor, Tensor] | None:
        own = [part for part in rows if part is not None]
        if not own:
            return None
        if len(rows) == 1 and not self._pad_always:
            k, v = own[0].permute(1, 2, 0, 3)
            return k, v
        # row 0 is for the places that are filled up
        table = torch.cat([own[0].new_zeros(1, *own[0].shape[1:]), *own])
        index = self._index([0 if part is None else len(part) for part in rows])
        found = table.index_select(0, index.flatten()).unflatten(0, index.shape)
        k, v = found.permute(2, 0, 3, 1, 4)
        return k, v

    def _index(self, counts: Sequence[int]) -> Tensor:
        """Return each image's rows [B, t] in a table of all parts' rows; row 0 fills the places left."""
        if (key := tuple(counts)) not in self._indices:
            index, first = [], 1
            # torch.compile would compile again for a length of 1
            length = max(2, *counts) if self._pad_always and any(counts) else max(counts)
            for size, count in zip(self._sizes, counts, strict=True):
                own = [*range(first, first + count), *[0] * (length - count)]
                index += [own] * size
                first += count
            self._indices[key] = torch.tensor(index, dtype=torch.long, device=self._device)
        return self._indices[key]

    def present(self, block: int) -> tuple[Tensor, Tensor] | None:
        """Return which prompts and which rows each image has; see `Method.present`."""
        counts = self._counts[block]
        rows = [0 if (own := task.rows[block]) is None else len(own) for _, task in self._parts]
        hidden = len(set(counts)) > 1 or len(set(rows)) > 1
        if not hidden and not (self._pad_always and any(rows)):
            return None
        prompts = self._index(counts)[:, : max(counts)]
        return prompts > 0, self._index(rows) > 0

    def branch(self, place: Place, block: int, x: Tensor, normed: Tensor | None) -> Tensor:
        """Return the terms of all images' tasks [B, n, width]; zero for prompts and for tasks without one."""
        out = torch.zeros_like(x)
        image = slice(0, self._num_image)
        for cls, group in groupby(self._parts, lambda part: type(part[1].method)):
            parts = list(group)
            if not issubclass(cls, Method) or place not in cls.places:
                continue
            where = slice(parts[0][0][0], parts[-1][0][1])
            methods = [(task.method, stop - start) for (start, stop), task in parts if task.method]
            own, own_normed = x[where, image], None if normed is None else normed[where, image]
            out[where, image] = cls.branches(methods, place, block, own, own_normed)
        return out

    def _each(
        self,
        name: str,
        x: Tensor,
        call: Callable[[Method, Tensor, slice], Tensor],
    ) -> Tensor:
        """Call a function of the tasks that change something there; other images stay as they are."""
        if not any(name in task.changes for _, task in self._parts):
            return x
        parts = []
        for span, task in self._parts:
            where = slice(*span)
            own = task.method if name in task.changes else None
            parts.append(x[where] if own is None else call(own, x[where], where))
        return torch.cat(parts)


def features_of(
    backbone: Family,
    images: Tensor,
    parts: Sequence[tuple[Span, Prepared]],
    batch: Batch,
    pad_always: bool = False,
) -> Tensor:
    """Return the features [B, width] of a batch in one pass of the backbone.

    Args:
        backbone: The backbone.
        images: Normalised images [B, 3, H, W], sorted by task.
        parts: For each span its task; all of them share a pass.
        batch: Read by the backbone's `PerTaskLayer`s, if it has any.
        pad_always: See `Mixed`.
    """
    method = Mixed(backbone, parts, pad_always)
    batch.layers = [(span, task.layers or {}) for span, task in parts]
    if not isinstance(backbone, TokenFamily):
        return method.features(backbone(images, method), images)
    found: list[tuple[slice, bool]] = []
    num_image = 0

    def pooled(count: int) -> tuple[slice, bool]:
        nonlocal num_image
        num_image = count
        found[:] = [backbone.pooled_rows(count, task.pool) for _, task in parts]
        stops = [rows.stop for rows, _ in found]
        first, last = min(rows.start for rows, _ in found), None if None in stops else max(stops)
        return slice(first, last), any(with_prompts for _, with_prompts in found)

    x = backbone.run(images, method, pooled)
    first = min(rows.start for rows, _ in found)
    features = []
    reads = []
    for (_, task), (rows, with_prompts) in zip(parts, found, strict=True):
        end = num_image + task.counts[-1] * with_prompts
        reads.append((task.pool, rows.start, end if rows.stop is None else rows.stop))
    # images whose pooling reads the same rows are pooled in one call
    for (pool, start, stop), group in groupby(zip(reads, parts, strict=True), itemgetter(0)):
        own_parts = [part for _, part in group]
        begin, end = own_parts[0][0][0], own_parts[-1][0][1]
        batch.layers = [((a - begin, b - begin), task.layers or {}) for (a, b), task in own_parts]
        own = x[begin:end, start - first : stop - first]
        features.append(backbone.pool(own, pool))
    return method.features(torch.cat(features), images)
