from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visprompt.data.datasets import Ticket
from visprompt.data.sampler import GlobalBatches, balanced
from visprompt.errors import UserError

dealings = given(
    num_rows=st.integers(1, 60),
    world=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    multiple=st.integers(1, 4),
    seed=st.integers(0, 3),
)


def ranks(world, **given):
    return [GlobalBatches(rank=rank, world=world, **given) for rank in range(world)]


@dealings
@settings(max_examples=60, deadline=None)
def test_training_shows_every_row_once_and_weighs_by_true_numbers(
    num_rows, world, accumulate, multiple, seed
):
    size = world * accumulate * multiple
    dealt = ranks(
        world,
        num_rows=num_rows,
        batch_size=size,
        accumulate=accumulate,
        seed=seed,
        epoch=lambda: 2,
        training=True,
    )
    steps = [list(batches) for batches in dealt]
    assert {len(own) for own in steps} == {len(dealt[0])} == {-(-num_rows // size) * accumulate}
    rows_of, weight_of = defaultdict(list), defaultdict(float)
    for own in steps:
        for step, tickets in enumerate(own):
            assert tickets
            assert all(ticket.epoch == 2 for ticket in tickets)
            rows_of[step // accumulate] += [ticket.row for ticket in tickets if ticket.weight]
            weight_of[step // accumulate] += sum(ticket.weight for ticket in tickets)
    order = np.random.default_rng([seed, 2]).permutation(num_rows).tolist()
    for number, rows in rows_of.items():
        assert sorted(rows) == sorted(order[number * size : (number + 1) * size])
        assert weight_of[number] / (world * accumulate) == pytest.approx(1)
    sizes = [len(tickets) for own in steps for tickets in own]
    assert max(sizes) == min(multiple, -(-num_rows // (world * accumulate)))


@dealings
@settings(max_examples=60, deadline=None)
def test_evaluation_shows_every_row_once_without_padding(num_rows, world, accumulate, multiple, seed):
    dealt = ranks(
        world, num_rows=num_rows, batch_size=multiple, accumulate=accumulate, seed=seed, training=False
    )
    steps = [list(batches) for batches in dealt]
    assert [len(own) for own in steps] == [len(batches) for batches in dealt]
    assert all(own and all(own) for own in steps), "a rank without batches would be skipped"
    tickets = [ticket for own in steps for batch in own for ticket in batch if ticket.weight]
    assert sorted(tickets) == [Ticket(row, None, 1.0) for row in range(num_rows)]
    assert all(len(batch) <= -(-multiple // world) for own in steps for batch in own)


def test_a_rank_without_rows_scores_a_filler_of_weight_zero():
    dealt = [list(own) for own in ranks(3, num_rows=2, batch_size=4, training=False)]
    assert dealt == [[[Ticket(0, None, 1.0)]], [[Ticket(1, None, 1.0)]], [[Ticket(0, None, 0.0)]]]


def test_797_images_on_two_ranks_are_399_and_398():
    counts = [sum(map(len, own)) for own in ranks(2, num_rows=797, batch_size=64, training=False)]
    assert counts == [399, 398]


def test_the_short_last_batch_gives_an_idle_rank_a_filler_of_weight_zero():
    first, second = (list(own) for own in ranks(2, num_rows=5, batch_size=4, training=True))
    assert [ticket.weight for ticket in first[0]] == [0.5, 0.5]
    assert [ticket.weight for ticket in first[1]] == [2.0]
    assert second[1] == [Ticket(first[1][0].row, 0, 0.0)]


def test_the_epoch_is_read_when_an_iteration_starts():
    now = [0]
    batches = GlobalBatches(num_rows=20, batch_size=20, seed=3, epoch=lambda: now[0], training=True)
    first = next(iter(batches))
    now[0] = 1
    second = next(iter(batches))
    assert {ticket.epoch for ticket in second} == {1}
    assert [ticket.row for ticket in first] != [ticket.row for ticket in second]


@dealings
@settings(max_examples=60, deadline=None)
def test_pairs_have_each_images_predecessor_in_the_global_batch(num_rows, world, accumulate, multiple, seed):
    size = world * accumulate * multiple
    given = {
        "num_rows": num_rows,
        "batch_size": size,
        "accumulate": accumulate,
        "seed": seed,
        "training": True,
    }
    plain = ranks(world, **given)
    paired = ranks(world, **given, pairs=True)
    order = np.random.default_rng([seed, 0]).permutation(num_rows).tolist()
    for own, alone in zip(paired, plain, strict=True):
        for step, (tickets, mine) in enumerate(zip(own, alone, strict=True)):
            batch = order[step // accumulate * size :][:size]
            assert tickets[1:] == mine
            assert tickets[0].weight == 0
            for before, ticket in pairwise(tickets):
                assert before.row == batch[batch.index(ticket.row) - 1]


@dealings
@settings(max_examples=60, deadline=None)
def test_scales_make_the_sum_a_weighted_mean_over_the_global_batch(
    num_rows, world, accumulate, multiple, seed
):
    size, draw = world * accumulate * multiple, np.random.default_rng(seed)
    weights, losses = draw.uniform(0.1, 3, num_rows), draw.uniform(0, 5, num_rows)
    dealt = ranks(
        world, num_rows=num_rows, batch_size=size, accumulate=accumulate, training=True, loss_weights=weights
    )
    sums, rows_of = defaultdict(float), defaultdict(list)
    for own in dealt:
        for step, tickets in enumerate(own):
            for t in tickets:
                sums[step // accumulate] += t.weight * t.scale * weights[t.row] * losses[t.row]
            rows_of[step // accumulate] += [t.row for t in tickets if t.weight]
    for step, rows in rows_of.items():
        expected = np.average(losses[rows], weights=weights[rows])
        assert sums[step] / (world * accumulate) == pytest.approx(expected)


def test_balanced_draws_are_with_replacement_the_same_on_any_number_of_ranks_and_count_repetitions():
    labels = np.array([0] * 90 + [1] * 9 + [2])
    given = {
        "num_rows": 100,
        "batch_size": 20,
        "seed": 3,
        "training": True,
        "probabilities": balanced(labels),
    }
    one = [ticket for batch in GlobalBatches(**given) for ticket in batch]
    halves = [list(own) for own in ranks(2, **given)]
    two = [
        ticket._replace(weight=0.05) for batches in zip(*halves, strict=True) for b in batches for ticket in b
    ]
    assert [ticket._replace(weight=0.05) for ticket in one] == two
    assert len(one) == 100
    by_class = Counter(labels[ticket.row] for ticket in one)
    assert all(20 < by_class[label] < 47 for label in range(3))
    seen = Counter()
    for ticket in one:
        assert ticket.repeat == seen[ticket.row]
        seen[ticket.row] += 1
    other = [t.row for batch in GlobalBatches(**given | {"epoch": lambda: 1}) for t in batch]
    assert other != [ticket.row for ticket in one]


@pytest.mark.parametrize(("size", "near"), [(66, "64 or 72"), (7, "8"), (0, "8")])
def test_a_batch_that_cannot_be_dealt_names_those_that_can(size, near):
    message = (
        rf"recipe.batch_size={size} cannot be dealt to 2 device\(s\) x 4 accumulation step\(s\): "
        rf"it must be a multiple of 8, the nearest being {near}$"
    )
    with pytest.raises(UserError, match=message):
        GlobalBatches(num_rows=10, batch_size=size, world=2, accumulate=4, training=True)
