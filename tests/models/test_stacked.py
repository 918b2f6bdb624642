"""A stack trains each point as a loop over that point alone would: losses, tuned tensors, dropout, batch statistics, figures."""

import pytest
import torch

from helpers.tiny import NUM_CLASSES, images, relative_error, tiny_classifier
from visprompt.data.sampler import GlobalBatches
from visprompt.models.kind import MULTI_LABEL, SINGLE_LABEL
from visprompt.models.objective import Objective
from visprompt.models.optim import build_optimizer
from visprompt.models.recipe import Recipe
from visprompt.models.seeds import epoch_seed
from visprompt.models.stacked import NEVER, Images, StackedTraining
from visprompt.models.stacked_classifier import StackedClassifier, step_bytes
from visprompt.models.stacked_optim import StackedOptimizer

COUNT, BATCH, EPOCHS = 52, 12, 4  # twenty steps; the last batch of an epoch has four images
METHODS = {"linear": {}, "mlp": {"dropout": 0.3}, "partial": {}}


class Recorded(Objective):
    """Keeps the losses of every step."""

    def __init__(self, *given):
        super().__init__(*given)
        self.losses = []

    def loss(self, *given):
        losses = super().loss(*given)
        self.losses.append(losses.detach())
        return losses


def recipe(lr=0.5, weight_decay=1e-3, optimizer="adamw", **changes):
    values = {"batch_size": BATCH, "epochs": EPOCHS, "warmup_epochs": 1, "head_init": "zeros"}
    return Recipe(lr=lr, weight_decay=weight_decay, optimizer=optimizer, **values | changes)


def prepared(method, count=COUNT):
    """A classifier, its initial tuned tensors, and images with frozen outputs."""
    classifier = tiny_classifier(method, **METHODS[method])
    names, state = classifier.tuned_tensor_names(), classifier.state_dict()
    classifier.eval()
    with torch.no_grad():
        outputs = classifier.frozen(images(count))
    classifier.train()
    labels = torch.arange(count) % NUM_CLASSES
    return classifier, {name: state[name].clone() for name in state if name in names}, Images(outputs, labels)


def sampler(seed, count, weights=None):
    return GlobalBatches(num_rows=count, batch_size=BATCH, seed=seed, training=True, loss_weights=weights)


def stacked(method, points, kind=SINGLE_LABEL, labels=None, count=COUNT):
    """A stack of points (recipe, seed) that is not trained yet."""
    classifier, state, data = prepared(method, count)
    data = data if labels is None else Images(data.outputs, labels)
    made, seeds = [point for point, _ in points], list(dict.fromkeys(seed for _, seed in points))
    stack = StackedClassifier(classifier, [state for _ in points])
    optimizer = StackedOptimizer(stack.parameters, made, -(-count // BATCH))
    objective = Recorded(made[0], kind, NUM_CLASSES, 0)
    weights = balance(objective, data.labels)
    batches, place = (
        [sampler(seed, count, weights) for seed in seeds],
        [seeds.index(seed) for _, seed in points],
    )
    return StackedTraining(stack, optimizer, objective, data, batches, seeds, place)


def balance(objective, labels):
    if objective.recipe.class_weights == "balanced":
        objective.balance(objective.kind.counts(labels, NUM_CLASSES))
    weights = objective.image_weights(labels)
    return None if weights is None else weights.double().numpy()


def alone(method, recipe, seed, epochs=EPOCHS, count=COUNT):
    """Losses of each step and the tuned tensors of one point, trained by a plain loop."""
    classifier, state, data = prepared(method, count)
    classifier.load_state_dict(state, strict=False)
    optimizer, schedule = build_optimizer(classifier.tuned_parameters(), recipe, -(-count // BATCH))
    objective, losses = Objective(recipe, SINGLE_LABEL, NUM_CLASSES, 0), []
    batches = sampler(seed, count, balance(objective, data.labels))
    for epoch in range(epochs):
        torch.manual_seed(epoch_seed(seed, epoch, 0))
        batches.epoch = lambda epoch=epoch: epoch
        for tickets in batches:
            rows = torch.tensor([ticket.row for ticket in tickets])
            weights, scales = (
                torch.tensor([getattr(t, name) for t in tickets]) for name in ("weight", "scale")
            )
            batch = type("B", (), {"labels": data.labels[rows], "scales": scales})
            each = objective.loss(classifier(data.outputs[rows]), batch, batch.labels, None)
            optimizer.zero_grad()
            (each * weights).sum().backward()
            optimizer.step()
            schedule.step()
            losses.append(each.detach())
    found = classifier.state_dict()
    return losses, {name: found[name] for name in state}


POINTS = [(recipe(0.1), 3), (recipe(0.5, 0.01), 3), (recipe(1.0), 4), (recipe(0.1, 0.01), 5)]


def check(training, method, points, error, count=COUNT):
    """Compare the losses of all steps and the tuned tensors at the end; heads to the bit where error is 0."""
    for point, (one, seed) in enumerate(points):
        losses, tensors = alone(method, one, seed, count=count)
        for ours, theirs in zip(training.objective.losses, losses, strict=True):
            assert relative_error(ours.unflatten(0, (len(points), -1))[point].mean(), theirs.mean()) < 1e-5
        found = training.classifier.state(point)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            same = torch.equal(found[name], tensor)
            assert same or relative_error(found[name], tensor) < error, (point, name)


@pytest.mark.parametrize("method", ["linear", "mlp"])
def test_each_head_is_trained_as_alone_to_the_bit(method):
    training = stacked(method, POINTS)
    for epoch in range(EPOCHS):
        training.epoch(epoch)
    assert training.steps == 20
    check(training, method, POINTS, 0)


def test_each_point_with_tuned_blocks_is_trained_as_alone():
    points = [(recipe(lr, optimizer="sgd"), seed) for lr, seed in ((0.1, 3), (0.5, 3), (0.1, 4))]
    training = stacked("partial", points)
    for epoch in range(EPOCHS):
        training.epoch(epoch)
    check(training, "partial", points, 1e-4)


def test_a_last_batch_of_one_image_has_no_batch_statistics():
    points = [(recipe(0.1, optimizer="sgd"), 3), (recipe(0.1, optimizer="sgd"), 4)]
    training = stacked("mlp", points, count=49)
    for epoch in range(EPOCHS):
        training.epoch(epoch)
    check(training, "mlp", points, 1e-5, count=49)
    assert int(training.classifier.state(0)["head.hidden.2.num_batches_tracked"]) == 4 * EPOCHS


def test_points_that_see_the_same_order_and_one_that_sees_another():
    """One seed takes another way through the code than several."""
    both, own = stacked("mlp", POINTS[:3]), stacked("mlp", POINTS[:2])
    for epoch in range(2):
        both.epoch(epoch)
        own.epoch(epoch)
    for point in range(2):
        states = both.classifier.state(point), own.classifier.state(point)
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("method", ["linear", "mlp"])
def test_a_point_that_diverges_is_found_at_its_step_and_reaches_no_other(method):
    wild = recipe(1e38, optimizer="sgd"), 3
    calm = [(recipe(0.1, optimizer="sgd"), 3), (recipe(0.5, optimizer="sgd"), 3)]
    whole, without = stacked(method, [calm[0], wild, calm[1]]), stacked(method, calm)
    logged = [training.epoch(0) for training in (whole, without)]
    losses, _ = alone(method, *wild, epochs=1)
    first = next(step for step, each in enumerate(losses) if not each.isfinite().all())
    assert whole.bad_step.tolist() == [NEVER, first, NEVER]
    assert without.bad_step.tolist() == [NEVER, NEVER]
    assert whole.classifier.finite().tolist() == [True, False, True]
    assert [logged[0][0], logged[0][2]] == logged[1]
    for ours, theirs in ((0, 0), (2, 1)):
        states = whole.classifier.state(ours), without.classifier.state(theirs)
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_class_weights_and_smoothing_are_those_of_a_single_run():
    one = recipe(class_weights="balanced", label_smoothing=0.1)
    training = stacked("linear", [(one, 3), (one, 4)])
    training.epoch(0)
    for point, seed in enumerate((3, 4)):
        assert torch.equal(
            training.classifier.state(point)["head.weight"], alone("linear", one, seed, 1)[1]["head.weight"]
        )


@pytest.mark.parametrize("kind", [SINGLE_LABEL, MULTI_LABEL])
def test_figures_are_those_of_the_kind_for_each_point(kind):
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(COUNT) % NUM_CLASSES
    if kind is MULTI_LABEL:
        labels = torch.randint(0, 2, (COUNT, NUM_CLASSES), generator=draw)
    training = stacked("linear", POINTS, kind, labels)
    training.epoch(0)
    for _ in range(2):  # a second scoring starts anew
        scored = training.score("val", [training.images], [0, 2])
    for point, found in zip((0, 2), scored, strict=True):
        (logits, seen), metric = next(training.logits([training.images])), kind.figures(NUM_CLASSES)
        metric.update(logits[point], seen, torch.ones(COUNT))
        expected = metric.compute()
        assert found.per_class == expected.pop("per_class")
        assert torch.equal(found.confusion, expected.pop("confusion"))
        assert found.scores == {f"val/{name}": value for name, value in expected.items()}
        assert found.scored_loss == pytest.approx(float(kind.loss(logits[point], seen).mean()))


def test_logits_come_in_parts_where_they_are_many(monkeypatch):
    training = stacked("linear", POINTS)
    ((logits, labels),) = training.logits([training.images])
    monkeypatch.setattr("visprompt.models.stacked._HELD", 1)
    parts = list(training.logits([training.images]))
    assert len(parts) == -(-COUNT // BATCH)
    assert torch.equal(torch.cat([part for part, _ in parts], 1), logits)
    assert torch.equal(torch.cat([own for _, own in parts]), labels)


def test_scoring_changes_nothing():
    training = stacked("mlp", POINTS)
    before = {name: tensor.clone() for name, tensor in training.classifier.state(1).items()}
    training.score("val", [training.images], [0])
    assert all(torch.equal(before[name], t) for name, t in training.classifier.state(1).items())
    assert training.classifier.classifier.head.training


def test_the_memory_of_a_step_grows_with_what_is_tuned():
    sizes = {}
    for method in METHODS:
        classifier, _, data = prepared(method)
        sizes[method] = step_bytes(classifier, data.outputs[:BATCH])
    assert sizes["linear"] < sizes["mlp"] < sizes["partial"]
    head = 4 * (32 * NUM_CLASSES + NUM_CLASSES)
    assert sizes["linear"] >= 6 * head + 4 * BATCH * 32
