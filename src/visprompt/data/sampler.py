"""The batch sampler: divides each global batch among devices and accumulation steps."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from visprompt.data.datasets import Ticket
from visprompt.errors import UserError


class Share(NamedTuple):
    """The images of one micro-batch of one rank; the columns of its tickets.

    Attributes:
        rows: int64 [b], positions in the dataset.
        weights: float64 [b], see `Ticket.weight`.
        scales: float64 [b], see `Ticket.scale`.
        repeats: int64 [b], see `Ticket.repeat`.
    """

    rows: np.ndarray
    weights: np.ndarray
    scales: np.ndarray
    repeats: np.ndarray


class GlobalBatches(Sampler[list[Ticket]]):
    """A batch sampler that yields the micro-batches of one rank, as lists of tickets.

    Training: a permutation drawn from (seed, epoch) is cut into global batches, of which the last may be
    short; each is split into `world * accumulate` nearly equal shares. A ticket's weight is world *
    accumulate / (images in the global batch): DDP averages gradients over ranks and Lightning divides a loss
    by `accumulate`, so sum(weight * loss) in each micro step gives the mean over the images of the global
    batch. An empty share becomes one ticket of weight 0, because all ranks must take the same number of
    steps.

    With `loss_weights` w, a ticket's scale is (images in the global batch) / (sum of their w), so that the
    mean of scale * w * loss is the sum of w * loss over the sum of w. With `probabilities`, an epoch draws as
    many rows as there are, with replacement. With `pairs`, each share begins with an additional ticket of
    weight 0: the image before its first one in the global batch, before the first the last. So every image of
    a share has its predecessor in the share, which mixing needs, on any number of devices.

    Evaluation: rows rank, rank + world, ... in order, with weight 1; each row on exactly one rank. A rank
    without rows gets one ticket of weight 0, which no score counts: Lightning skips a loop without batches,
    and the other ranks would wait forever for this rank's part of the score.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
        training: bool,
        probabilities: np.ndarray | None = None,
        loss_weights: np.ndarray | None = None,
        pairs: bool = False,
    ) -> None:
        """Check that a global batch can be divided.

        Args:
            num_rows: Rows of the dataset.
            batch_size: Images of a global batch, over all ranks and accumulation steps.
            rank: Index of this process, 0 .. world - 1.
            world: Number of processes.
            accumulate: Micro steps per optimiser step.
            seed: Seed of the permutations.
            epoch: Returns the epoch; called at the start of each iteration, so that a resumed run has the
                right one.
            training: Whether rows are shuffled for training, or scored in order.
            probabilities: float [num_rows], with which each draw of a training epoch takes a row; None takes
                each row once.
            loss_weights: float [num_rows], above 0: the weight of each image's loss; None is 1 for all.
            pairs: Whether each training share has its images' predecessors.

        Raises:
            UserError: A training batch cannot be divided evenly.
        """
        shares = world * accumulate
        if training and (batch_size < 1 or batch_size % shares):
            raise _uneven(batch_size, world, accumulate)
        self.num_rows, self.batch_size, self.rank, self.world = num_rows, batch_size, rank, world
        self.accumulate, self.seed, self.epoch, self.training = accumulate, seed, epoch, training
        self.probabilities, self.loss_weights, self.pairs = probabilities, loss_weights, pairs

    def __len__(self) -> int:
        if self.training:
            return -(-self.num_rows // self.batch_size) * self.accumulate
        return max(1, -(-len(range(self.rank, self.num_rows, self.world)) // self._eval_size))

    def __iter__(self) -> Iterator[list[Ticket]]:
        epoch = self.epoch() if self.training else None
        for part in self.shares(epoch):
            numbers = (part.weights, part.scales, part.repeats)
            columns = zip(part.rows.tolist(), *(column.tolist() for column in numbers), strict=True)
            yield [Ticket(row, epoch, *rest) for row, *rest in columns]

    def shares(self, epoch: int | None) -> Iterator[Share]:
        """Yield this rank's micro-batches of an epoch; None is evaluation."""
        return self._evaluate() if epoch is None else self._train(epoch)

    @property
    def _eval_size(self) -> int:
        return -(-self.batch_size // self.world)

    def _train(self, epoch: int) -> Iterator[Share]:
        draw = np.random.default_rng([self.seed, epoch])
        if self.probabilities is None:
            order, repeats = draw.permutation(self.num_rows), np.zeros(self.num_rows, np.int64)
        else:
            order = draw.choice(self.num_rows, self.num_rows, p=self.probabilities)
            repeats = _repeats(order)
        shares = self.world * self.accumulate
        for start in range(0, self.num_rows, self.batch_size):
            batch = order[start : start + self.batch_size]
            again = repeats[start : start + self.batch_size]
            scale = 1.0
            if self.loss_weights is not None:
                scale = len(batch) / float(self.loss_weights[batch].sum())
            places = np.arange(len(batch))
            parts = [places] if shares == 1 else np.array_split(places, shares)  # which is slow
            for micro in range(self.accumulate):
                places = parts[micro * self.world + self.rank]
                weights = np.full(len(places), shares / len(batch))
                if not len(places):
                    places, weights = np.zeros(1, np.int64), np.zeros(1)
                if self.pairs:
                    # a filler's is the last image, as the first's; -1 is the last place
                    places, weights = np.r_[places[0] - 1, places], np.r_[0.0, weights]
                yield Share(batch[places], weights, np.full(len(places), scale), again[places])

    def _evaluate(self) -> Iterator[Share]:
        rows, weight = np.arange(self.rank, self.num_rows, self.world), 1.0
        if not len(rows):
            rows, weight = np.zeros(1, np.int64), 0.0
        for start in range(0, len(rows), self._eval_size):
            part = rows[start : start + self._eval_size]
            yield Share(part, np.full(len(part), weight), np.ones(len(part)), np.zeros(len(part), np.int64))


def _repeats(order: np.ndarray) -> np.ndarray:
    """Return how often each entry occurred before: [5, 2, 5, 5] gives [0, 0, 1, 2]."""
    by_row = np.argsort(order, kind="stable")
    ordered = order[by_row]
    begins = np.r_[True, ordered[1:] != ordered[:-1]]
    places = np.arange(len(order))
    repeats = np.empty_like(places)
    repeats[by_row] = places - np.maximum.accumulate(np.where(begins, places, 0))
    return repeats


def _uneven(batch_size: int, world: int, accumulate: int) -> UserError:
    shares = world * accumulate
    below = batch_size // shares * shares
    near = f"{below} or {below + shares}" if below > 0 else str(shares)
    return UserError(
        f"recipe.batch_size={batch_size} cannot be dealt to {world} device(s) x {accumulate} accumulation "
        f"step(s): it must be a multiple of {shares}, the nearest being {near}"
    )


def balanced(labels: np.ndarray) -> np.ndarray:
    """Return the probability of drawing each image so that all classes are equally probable.

    Args:
        labels: int64 [n].

    Returns:
        float64 [n]; the sum is 1.
    """
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return np.asarray(1 / (len(counts) * counts[classes]))
