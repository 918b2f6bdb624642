"""DA-VPT: deep prompts and a loss that draws some of them to their classes, written out pair by pair."""

import copy
import math

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing
from torch.nn import functional as F

from helpers.cli import frozen, tiny_run
from helpers.tiny import VIT_B_SIZE, geometry, images, naive_features, relative_error, tiny_model, worst_error
from visprompt.data.datasets import Batch
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.contract import Method
from visprompt.models.methods.da_vpt import DAVPT, cosine_kmeans
from visprompt.models.recipe import Recipe
from visprompt.models.tuning_module import TuningModule, first_of_each
from visprompt.runs import run

TINY, VIT_B = geometry(), geometry(**VIT_B_SIZE)
LABELS = torch.tensor([0, 3, 1, 0, 4, 2])
# far from where exp(32 * ...) hides all but one pair
SMALL = {
    "num_tokens": 3,
    "guided_tokens": 2,
    "scale": 0.3,
}
EVEN = torch.full((6,), 1 / 6)


def classifier(classes=5, model=None, **options):
    torch.manual_seed(1)
    backbone = ViT(tiny_model() if model is None else model)
    made = Classifier(backbone, DAVPT(backbone, **SMALL | options), classes)
    with torch.no_grad():
        for name, parameter in made.tuned_parameters():
            parameter.add_(
                0.2 * torch.randn_like(parameter) if "prompt" not in name else torch.randn_like(parameter)
            )
    return made.train()


def gradients(model, loss):
    names, parameters = zip(*model.tuned_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def anchor(vectors, prompts, scale, mapping, labels):
    """Proxy anchor as it reads: for each prompt, over its own images, then over all others."""
    total = 0.0
    for k, prompt in enumerate(prompts):
        own, others = 1.0, 1.0
        for z, label in zip(vectors, labels, strict=True):
            s = scale * (z @ prompt) / (z.norm() * prompt.norm())
            if mapping[label] == k:
                own = own + torch.exp(-32 * (s - 0.1))
            else:
                others = others + torch.exp(32 * (s + 0.1))
        total = total + torch.log(torch.as_tensor(own)) + torch.log(others)
    return total / len(prompts)


def naive(model, x, labels):
    """Logits, and the loss of the whole batch: timm's whole blocks, prompts behind the class token."""
    method, vit = model.method, model.backbone.model
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    terms, first = [], len(vit.blocks) - len(method.guided)
    for i, block in enumerate(vit.blocks):
        prompts = (
            method.guided[i - first] if i >= first else (() if method.prompts is None else method.prompts[i])
        )
        if len(prompts) and method.norm == "l2":
            prompts = prompts / prompts.norm(dim=1, keepdim=True)
        if i >= first:
            e = tokens[:, 1:].mean(dim=1)
            q = block.attn.qkv(block.norm1(tokens))[:, 0, :32]
            mapping = method.mapping.tolist()
            terms.append(
                method.patch_weight * anchor(e, prompts, method.scale, mapping, labels)
                + method.class_weight * anchor(q, prompts, method.scale, mapping, labels)
            )
        count = len(prompts)
        if count:
            tokens = torch.cat([tokens[:, :1], prompts.expand(len(x), -1, -1), tokens[:, 1:]], dim=1)
        tokens = block(tokens)
        tokens = torch.cat([tokens[:, :1], tokens[:, 1 + count :]], dim=1)
    logits = model.head(vit.forward_head(vit.norm(tokens), pre_logits=True))
    return logits, F.cross_entropy(logits, labels) + sum(terms) / len(terms)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guided_blocks": 2, "patch_weight": 1.0, "class_weight": 0.3},
        {"guided_blocks": 4},
        {"num_tokens": 0, "norm": "l2"},
        {"guided_tokens": 9},
        {"bias": True},
    ],
)
def test_logits_loss_and_gradients_are_those_of_the_equations(options):
    model = classifier(**options)
    logits = model(images(6))
    loss = (model.losses(logits, LABELS, EVEN) * EVEN).sum()
    expected, whole = naive(model, images(6), LABELS)
    assert relative_error(logits, expected) < 1e-5
    assert abs(loss - whole) < 1e-5 * abs(whole)
    assert whole > 1.001 * F.cross_entropy(expected, LABELS)
    assert worst_error(gradients(model, loss), gradients(model, whole)) < 1e-5


def test_without_weights_it_is_deep_prompts():
    model = classifier(patch_weight=0.0, class_weight=0.0, guided_tokens=3)
    prompts = torch.cat([model.method.prompts, model.method.guided])
    logits = model(images(6))
    assert (
        relative_error(logits, model.head(naive_features(model.backbone.model, images(6), prompts, 0, False)))
        < 1e-5
    )
    assert torch.equal(model.losses(logits, LABELS, EVEN), F.cross_entropy(logits, LABELS, reduction="none"))


def test_a_filler_is_no_image_of_the_batch():
    model, weights = classifier(), torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0, 0.0])
    with_filler = (model.losses(model(images(6)), LABELS, weights) * weights).sum()
    alone = (model.losses(model(images(6)[:4]), LABELS[:4], weights[:4]) * weights[:4]).sum()
    assert with_filler.item() == pytest.approx(alone.item(), rel=1e-5)


def test_descent_draws_prompts_to_their_images_and_away_from_others():
    """What the paper promises of the loss."""
    model = classifier(guided_tokens=5, patch_weight=0.0, class_weight=1.0, scale=1.0)
    optimizer = torch.optim.SGD([model.method.guided], lr=0.05)

    def gap():
        x = model.backbone.states(images(6))[3]
        q = model.method._queries(0, x)
        cosines = F.normalize(q, dim=1) @ F.normalize(model.method.guided[0], dim=1).T
        own = F.one_hot(LABELS, 5).bool()
        return float((cosines[own].mean() - cosines[~own].mean()).detach())

    before = gap()
    for _ in range(30):
        optimizer.zero_grad()
        model.losses(model(images(6)), LABELS, EVEN).mean().backward()
        optimizer.step()
    assert gap() > before + 0.02


def test_scoring_and_predicting_keep_nothing():
    model = classifier().eval()
    logits = model(images(6))
    assert not model.method._inputs
    assert torch.equal(model.losses(logits, LABELS, EVEN), F.cross_entropy(logits, LABELS, reduction="none"))
    with torch.no_grad():
        model.train()(images(6))
    assert not model.method._inputs


def test_the_loss_is_in_float32_under_autocast():
    model = classifier()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(model(images(6)), LABELS, EVEN)
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()


def test_biases_of_values_are_those_of_a_plain_model():
    model = classifier(bias=True)
    plain = tiny_model()
    own = {
        n.removeprefix("backbone.model."): p for n, p in model.tuned_parameters() if n.startswith("backbone.")
    }
    with torch.no_grad():
        for name, parameter in own.items():
            plain.get_parameter(name).copy_(parameter)
        for block, bias in zip(plain.blocks, model.method.value_bias, strict=True):
            block.attn.qkv.bias[64:] += bias
    other = classifier(model=plain)
    other.method.load_state_dict(model.method.state_dict(), strict=False)
    other.head.load_state_dict(model.head.state_dict())
    assert relative_error(model(images()), other(images())) < 1e-5
    tuned = {"norm1.weight", "norm1.bias", "norm2.bias", "attn.proj.bias", "mlp.fc2.bias"}
    assert set(own) == {"cls_token"} | {f"blocks.{i}.{name}" for i in range(4) for name in tuned}


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"num_tokens": 20, "guided_tokens": 10}, (11 * 20 + 10) * 768),
        ({"num_tokens": 10, "guided_tokens": 10, "guided_blocks": 2, "bias": True}, 12 * 10 * 768 + 12 * 768),
        ({"num_tokens": 0, "guided_tokens": 10}, 10 * 768),
    ],
)
def test_counts_on_vit_b(options, count):
    assert sum(p.numel() for p in DAVPT(VIT_B, **options).parameters()) == count


def test_prompts_are_drawn_as_in_the_released_code():
    torch.manual_seed(0)
    method = DAVPT(VIT_B, num_tokens=20, guided_tokens=10, guided_blocks=2)
    for prompts, depth, count in ((method.prompts, 10, 20), (method.guided, 2, 10)):
        bound = math.sqrt(6 / ((depth + count) * 768)) / 8
        assert prompts.shape == (depth, count, 768)
        assert 0.999 * bound < prompts.abs().max() <= bound


def test_what_is_saved():
    keys = {"prompts", "guided", "mapping", "centres", "head.weight", "head.bias"}
    assert set(classifier().tuned_state()) == keys
    saved = classifier(bias=True).tuned_state()
    assert {name for name in saved if not name.startswith("backbone.")} == keys | {"value_bias"}
    assert len(saved) == 7 + 1 + 4 * 5


def test_no_more_prompts_than_classes():
    method = classifier(guided_tokens=9).method
    assert method.guided.shape == (1, 5, 32)
    assert method.mapping.tolist() == [0, 1, 2, 3, 4]
    assert not method.needs_images
    assert classifier().method.mapping.tolist() == [0, 1, 0, 1, 0], "until the classes are seen"


def test_classes_are_mapped_by_their_mean_features():
    """Images of two kinds, three classes of the first and two of the second: two prompts."""
    model, kinds = classifier(), images(2)
    labels = torch.arange(5).repeat(3)
    x = kinds[(labels >= 3).long()] + 0.01 * images(15)
    model.method.see_classes(model.backbone, zip(x.split(4), labels.split(4), strict=True), seed=3)
    mapping = model.method.mapping.tolist()
    assert mapping in ([0, 0, 0, 1, 1], [1, 1, 1, 0, 0])
    with torch.no_grad():
        features = ViT(tiny_model())(x, Method(TINY))
    means = torch.stack([F.layer_norm(features[labels == c].mean(0), (32,)) for c in range(5)])
    for k in range(2):
        of_prompt = means[[c for c in range(5) if mapping[c] == k]].mean(0)
        assert relative_error(model.method.centres[k], of_prompt) < 1e-4


def test_classes_are_mapped_anew_behind_an_epoch():
    model, labels = classifier(remap_from=1), torch.arange(5).repeat(3)
    x = images(2)[(labels >= 3).long()] + 0.01 * images(15)
    for epoch, changed in ((0, False), (1, True)):
        for part, of_part in zip(x.split(4), labels.split(4), strict=True):
            model.losses(model(part), of_part, torch.ones(len(part)))
        model.method.end_epoch(epoch)
        assert (model.method.mapping.tolist() != [0, 1, 0, 1, 0]) == changed
    assert model.method.mapping[0] == model.method.mapping[2] != model.method.mapping[3]
    before = model.eval()(images())
    with torch.no_grad():
        model.method.mapping.fill_(0)
        model.method.centres.fill_(7)
    assert torch.equal(model(images()), before), "a prediction reads neither"
    never = classifier(remap_from=0)
    never.losses(never(x), labels, torch.ones(15))
    never.method.end_epoch(50)
    assert never.method.mapping.tolist() == [0, 1, 0, 1, 0]


def test_kmeans_by_cosine():
    data = torch.tensor([[1.0, 0.1], [5.0, 0.0], [0.1, 1.0], [0.0, 3.0]])
    nearest, centres = cosine_kmeans(data, 2, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.Generator())
    assert nearest.tolist() == [0, 0, 1, 1]
    assert torch.allclose(centres, torch.tensor([[3.0, 0.05], [0.05, 2.0]]))
    far = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    nearest, centres = cosine_kmeans(data, 2, far, torch.Generator())
    assert nearest.tolist() == [0] * 4
    assert torch.equal(centres[1], far[1]), "a centre without vectors stays"


def test_a_short_batch_has_the_mean_over_its_images():
    module = TuningModule(
        classifier(),
        Recipe(optimizer="sgd", lr=1, weight_decay=0, batch_size=6, epochs=1, warmup_epochs=0),
        seed=1,
    )
    loss = module.training_step(Batch(images(3), LABELS[:3], torch.arange(3), torch.full((3,), 1 / 3)), 0)
    _, expected = naive(module.classifier, images(3), LABELS[:3])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_up_to_so_many_rows_of_each_class():
    rows = first_of_each(torch.tensor([0, 1, 0, 0, 1]).numpy(), torch.tensor([4, 3, 2, 1, 0]).numpy(), 2)
    assert rows.tolist() == [4, 3, 2, 1]


def on_a_rank(rank, shares, address, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    model = classifier()
    rows = slice(*shares[rank])
    x, labels = images(6)[rows], LABELS[rows]
    weights = torch.full((len(x),), 2 / 5)
    if shares[rank][0] >= 5:  # a rank without images takes one that does not count
        weights = torch.zeros(len(x))
    loss = (model.losses(model(x), labels, weights) * weights).sum()
    mine = gradients(model, loss)
    for gradient in mine.values():
        dist.all_reduce(gradient)
        gradient /= 2
    if rank == 0:
        torch.save(mine, results)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("shares", [((0, 3), (3, 5)), ((0, 5), (5, 6))])
def test_two_devices_have_the_gradients_of_one(tmp_path, shares):
    multiprocessing.spawn(on_a_rank, (shares, tmp_path / "meet", tmp_path / "gradients"), nprocs=2)
    model, weights = classifier(), torch.full((5,), 1 / 5)
    loss = (model.losses(model(images(6)[:5]), LABELS[:5], weights) * weights).sum()
    assert worst_error(torch.load(tmp_path / "gradients"), gradients(model, loss)) < 1e-5


@frozen
def test_a_run_maps_the_classes_and_refuses_accumulation(tmp_path, monkeypatch):
    seen, original = [], DAVPT.see_classes

    def note(self, backbone, batches, seed):
        batches = list(batches)
        seen.append(torch.cat([labels for _, labels in batches]).bincount().tolist())
        original(self, backbone, batches, seed)

    monkeypatch.setattr(DAVPT, "see_classes", note)
    options = ("method=da_vpt", "method.num_tokens=2", "method.guided_tokens=3", "recipe.epochs=3")
    result = run.run_job(tiny_run(tmp_path, *options))
    assert len(seen) == 1
    assert len(seen[0]) == 10
    assert max(seen[0]) <= 10
    assert result.status == "finished"
    with pytest.raises(
        UserError, match=r"this method's loss compares the images of a batch, .*: set trainer\.accum"
    ):
        run.run_job(tiny_run(tmp_path / "parts", *options, "trainer.accumulate_grad_batches=2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": -1}, "method.num_tokens=-1 is too small: give at least 0"),
        ({"guided_tokens": 0}, "method.guided_tokens=0 is too small: give at least 1"),
        ({"guided_blocks": 5}, "method.guided_blocks=5 does not fit: give 1 to 4, the backbone's blocks"),
        ({"guided_blocks": 0}, "method.guided_blocks=0 does not fit"),
        ({"patch_weight": -0.1}, "method.patch_weight=-0.1 is too small: give at least 0"),
        ({"class_weight": -1.0}, "method.class_weight=-1.0 is too small"),
        ({"scale": 0.0}, "method.scale=0.0 is not a positive finite number: give a number above 0"),
        ({"norm": "l1"}, "unknown method.norm 'l1'"),
        ({"remap_from": -1}, "method.remap_from=-1 is too small"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        DAVPT(TINY, **options)


def test_a_copy_tunes_by_itself():
    model = classifier(bias=True)
    twin = copy.deepcopy(model)
    loss = (twin.losses(twin(images(6)), LABELS, EVEN) * EVEN).sum()
    loss.backward()
    assert all(p.grad is not None for _, p in twin.tuned_parameters())
    assert all(p.grad is None for _, p in model.tuned_parameters())
