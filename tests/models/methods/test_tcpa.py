"""TCPA: what each token sees of the prompts, written out as the released code masks it."""

import pytest
import torch
from torch.nn import functional as F

from helpers.tiny import NUM_CLASSES, VIT_B_SIZE, geometry, images, relative_error, tiny_model, worst_error
from helpers.wide import star
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.methods.tcpa import TCPA

TINY, VIT_B = geometry(), geometry(**VIT_B_SIZE)
LABELS = torch.tensor([0, 3, 1])
EVEN = torch.full((3,), 1 / 3)
DEFAULTS = {"pool_size": 5, "chosen": 2, "dropout": 0.0, "random_epochs": 0, "match_weight": 0.3}


def classifier(model=None, exact=True, **options):
    torch.manual_seed(1)
    backbone = ViT(tiny_model(init_values=0.5) if model is None else model, exact)
    made = Classifier(backbone, TCPA(backbone, **DEFAULTS | options), NUM_CLASSES)
    with torch.no_grad():
        for name, parameter in made.tuned_parameters():
            if name.startswith("head"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return made.train()


def gradients(model, loss):
    names, parameters = zip(*model.tuned_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def chosen_by(method, block, pool, token):
    """Indices of the entries whose keys are nearest, and their mean distance."""
    cosines = torch.stack([F.cosine_similarity(token, key, dim=0) for key in method.keys[block, pool]])
    entries = cosines.sort(descending=True).indices[: method.chosen]
    return entries.tolist(), 1 - cosines[entries].mean()


def naive(model, x):
    """Logits [B, classes] and distances [B], token by token; prompts stand behind the class token."""
    method, vit = model.method, model.backbone.model
    prefix, size, length = vit.num_prefix_tokens, *method.prompts.shape[2:4]
    logits, distances = [], []
    for image in x:
        tokens, distance = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))[0], 0.0
        for i, block in enumerate(vit.blocks):
            pools, n, p = method.prompts.shape[1], len(tokens), size * length
            mask = torch.zeros(n, n + pools * p)
            parts = [[] for _ in range(pools)]
            for row, token in enumerate(tokens):
                pool = int(0 < prefix <= row)
                entries, away = chosen_by(method, i, pool, token)
                parts[pool].append(away)
                mask[row, :prefix] = mask[row, prefix + pools * p :] = 1
                for entry in entries:
                    start = prefix + pool * p + entry * length
                    mask[row, start : start + length] = 1
            distance = distance + sum(torch.stack(part).mean() for part in parts)
            joined = torch.cat([entries.reshape(p, -1) for entries in method.prompts[i]])
            prompts = torch.fft.fft(torch.fft.fft(joined, dim=-1), dim=-2).real
            normed = block.norm1(torch.cat([tokens[:prefix], prompts, tokens[prefix:]]))
            q, k, v = (
                part.unflatten(-1, (2, 16)).transpose(0, 1) for part in block.attn.qkv(normed).split(32, -1)
            )
            weights = (q @ k.mT / 4).softmax(dim=-1)
            weights = torch.cat([weights[:, :prefix], weights[:, prefix + pools * p :]], dim=1) * mask
            tokens = tokens + block.ls1(block.attn.proj((weights @ v).transpose(0, 1).flatten(1)))
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        logits.append(model.head(vit.forward_head(vit.norm(tokens[None]), pre_logits=True))[0])
        distances.append(distance)
    return torch.stack(logits), torch.stack(distances)


MODELS = {
    "class": {"init_values": 0.5},
    "average": {"global_pool": "avg"},
    "patches alone": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
}


@pytest.mark.parametrize(
    ("options", "kind", "exact"), star([{}, {"length": 3}, {"chosen": 5}], [*MODELS], [True, False])
)
def test_logits_loss_and_gradients_are_those_of_the_equations(kind, exact, options):
    model = classifier(tiny_model(**MODELS[kind]), exact, **options)
    logits = model(images(3))
    loss = (model.losses(logits, LABELS, EVEN) * EVEN).sum()
    expected, distances = naive(model, images(3))
    whole = F.cross_entropy(expected, LABELS) + model.method.match_weight * distances.mean()
    assert relative_error(logits, expected) < 1e-5
    assert abs(loss - whole) < 1e-5 * abs(whole)
    assert worst_error(gradients(model, loss), gradients(model, whole)) < 1e-5
    assert relative_error(model.eval()(images(3)), expected) < 1e-5


def test_only_the_matching_loss_moves_the_keys():
    model = classifier()
    loss = F.cross_entropy(model(images(3)), LABELS)
    prompts, keys = torch.autograd.grad(loss, [model.method.prompts, model.method.keys], allow_unused=True)
    assert prompts.abs().max() > 0
    assert keys is None


def test_without_the_matching_loss_the_keys_are_saved_but_not_tuned():
    """DDP waits for the gradient of every parameter."""
    model, without = classifier(), classifier(match_weight=0.0)
    loss = (without.losses(without(images(3)), LABELS, EVEN) * EVEN).sum()
    assert "method.keys" not in gradients(without, loss)
    assert torch.equal(without.tuned_state()["keys"], model.method.keys)


def test_first_epochs_choose_at_random_and_only_in_training():
    model = classifier(random_epochs=2)
    seen = [model(images(3)) for _ in range(2)]
    assert not torch.equal(*seen)
    model.method.end_epoch(0)
    assert not torch.equal(model(images(3)), model(images(3)))
    expected, _ = naive(model, images(3))
    assert relative_error(model.eval()(images(3)), expected) < 1e-5
    model.train()
    model.method.end_epoch(1)
    assert torch.equal(model(images(3)), model(images(3)))


def test_nothing_is_kept_behind_a_prediction():
    model = classifier().eval()
    logits = model(images(3))
    assert not model.method._state
    assert torch.equal(model.losses(logits, LABELS, EVEN), F.cross_entropy(logits, LABELS, reduction="none"))


def test_dropout_is_drawn_in_training_only():
    model = classifier(dropout=0.5)
    assert not torch.equal(model(images(3)), model(images(3)))
    model.eval()
    assert torch.equal(model(images(3)), model(images(3)))


def test_counts_and_first_values_on_vit_b():
    method = TCPA(VIT_B)
    assert sum(p.numel() for p in method.parameters()) == 2 * 12 * 2 * 18 * 768
    for values in (method.prompts, method.keys):
        assert 0.999 < values.abs().max() <= 1
        assert values.std().item() == pytest.approx(3**-0.5, rel=0.01)


def test_what_is_saved():
    assert set(classifier().tuned_state()) == {"prompts", "keys", "epochs", "head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_size": 0}, "method.pool_size=0 is too small: give at least 1"),
        ({"chosen": 0}, "method.chosen=0 is too small: give at least 1"),
        ({"chosen": 19}, "method.chosen=19 is more than a pool holds: give at most method.pool_size=18"),
        ({"length": 0}, "method.length=0 is too small: give at least 1"),
        ({"match_weight": -0.1}, "method.match_weight=-0.1 is too small: give at least 0"),
        ({"random_epochs": -1}, "method.random_epochs=-1 is too small: give at least 0"),
        ({"dropout": 1.0}, "method.dropout=1.0 is not a probability"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        TCPA(TINY, **options)
