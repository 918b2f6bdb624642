"""Prompts that start as features of training images, each kind against the features that timm itself gives."""

import pytest
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_info

from helpers.tiny import images, tiny_classifier, tiny_model
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.methods import inits
from visprompt.models.methods.vpt import VPT

KINDS = ("cls", "cls_layer", "patch_sample", "patch_pool", "patch_kmeans")


def initialised(init, count=8, seed=42, batches=None, model=None, **options):
    classifier = tiny_classifier("vpt_deep", model=model, **({"num_tokens": 3} | options), init=init).eval()
    assert classifier.method.needs_images
    inits.initialise(classifier.method, classifier.backbone, batches or images(count), seed)
    return classifier.method


def states(model, x):
    """Tokens before each block, and behind the last."""
    passed, hooks = [], []
    for block in model.blocks:
        hooks.append(block.register_forward_hook(lambda _, args, out: passed.append((args[0], out))))
    model.forward_features(x)
    for hook in hooks:
        hook.remove()
    return [entering for entering, _ in passed] + [passed[-1][1]]


def among(rows, candidates):
    """Whether every row is one of the candidates."""
    return bool(((rows[:, None] - candidates).abs().amax(2).min(1).values < 1e-4).all())


@pytest.mark.parametrize("options", [{}, {"depth": 2, "depth_from": "last"}])
def test_class_tokens_are_those_of_as_many_training_images(options):
    model, x = tiny_model(), images(8)
    final, layers = initialised("cls", **options).prompts, initialised("cls_layer", **options).prompts
    tokens = states(model, x)
    first = 4 - len(final)
    for i in range(len(final)):
        assert among(final[i], model.norm(tokens[-1])[:, 0])
        assert among(layers[i], tokens[first + i + 1][:, 0])
        assert torch.pdist(final[i]).min() > 0.01, "no image twice"
    assert torch.equal(final[0], final[1])


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4}, {"global_pool": "avg", "class_token": False}])
def test_sampled_patches_are_those_before_the_block(options):
    model = tiny_model(**options)
    prompts = initialised("patch_sample", model=tiny_model(**options)).prompts
    tokens = states(model, images(8))
    for i in range(4):
        assert among(prompts[i], tokens[i][:, model.num_prefix_tokens :].flatten(0, 1))


def test_pooled_patches_are_the_means_of_successive_images():
    """Of 16 patches all are taken, so that with as many prompts as images each is the mean of its image."""
    prompts = initialised("patch_pool", count=4, num_tokens=4).prompts
    tokens = states(tiny_model(), images(4))
    for i in range(4):
        assert torch.allclose(prompts[i], tokens[i][:, 1:].mean(1), atol=1e-4)


def test_centres_lie_in_the_middle_of_what_is_nearest_to_them():
    prompts = initialised("patch_kmeans").prompts
    tokens = states(tiny_model(), images(8))
    for i in range(4):
        rows = tokens[i][:, 1:].flatten(0, 1)
        nearest = torch.cdist(rows, prompts[i]).argmin(1)
        means = torch.stack([rows[nearest == k].mean(0) for k in range(3)])
        assert torch.allclose(prompts[i], means, atol=1e-3)


def test_centres_are_computed_by_one_thread_as_several_add_in_any_order(monkeypatch):
    threads, fit = [], KMeans.fit

    def noted(self, rows):
        threads.extend(pool["num_threads"] for pool in threadpool_info())
        return fit(self, rows)

    monkeypatch.setattr(KMeans, "fit", noted)
    initialised("patch_kmeans")
    assert set(threads) == {1}


@pytest.mark.parametrize("init", KINDS)
def test_a_seed_decides_and_batches_do_not(init):
    one = initialised(init).prompts
    assert torch.equal(one, initialised(init).prompts)
    assert torch.allclose(one, initialised(init, batches=list(images(8).split(3))).prompts, atol=1e-4)
    if init != "patch_pool":  # all 16 patches of an image are taken
        assert not torch.equal(one, initialised(init, seed=1).prompts)
    assert one.requires_grad
    assert one.is_leaf


@pytest.mark.parametrize("init", KINDS)
@pytest.mark.parametrize(
    ("shared", "shape"), [("intra", (4, 1, 32)), ("inter", (1, 3, 32)), ("all", (1, 1, 32))]
)
def test_shared_prompts_start_as_those_of_the_first_of_their_layers(init, shared, shape):
    prompts = initialised(init, shared=shared).prompts
    assert prompts.shape == shape
    if shared == "inter" and init != "cls":
        assert torch.equal(prompts[0], initialised(init, depth=1).prompts[0])


def test_only_so_many_images_are_looked_at(monkeypatch):
    monkeypatch.setattr(inits, "MAX_IMAGES", 5)
    given = iter(list(images(9).split(3)))
    prompts = initialised("cls", batches=given, num_tokens=5).prompts
    assert among(prompts[0], tiny_model().forward_features(images(9))[:5, 0])
    assert len(prompts[0]) == 5


def test_random_prompts_stay_as_they_are():
    backbone = ViT(tiny_model())
    method = VPT(backbone)
    before = method.prompts.detach().clone()
    inits.initialise(method, backbone, images(2))
    assert torch.equal(method.prompts, before)
    assert not method.needs_images


def test_frozen_prompts_start_as_features_too():
    prompts = initialised("patch_sample", frozen=True).prompts
    assert not prompts.requires_grad
    assert torch.equal(prompts, initialised("patch_sample").prompts)


@pytest.mark.parametrize(
    ("init", "count", "options", "message"),
    [
        (
            "cls",
            2,
            {},
            "method.init=cls takes 3 prompt tokens from as many training images, and there are only 2: give "
            "method",
        ),
        (
            "patch_pool",
            1,
            {"num_tokens": 17},
            "takes 17 prompt tokens from as many patches, and there are only 16",
        ),
        (
            "cls",
            8,
            {"project": 4},
            "method.init=cls gives prompts of the backbone's width, and method.project=4 needs another width",
        ),
        ("clss", 8, {}, "unknown method.init 'clss': did you mean cls"),
    ],
)
def test_what_cannot_be_is_one_sentence(init, count, options, message):
    with pytest.raises(UserError, match=message):
        initialised(init, count, **options)


@pytest.mark.parametrize("options", [{"init": "cls_layer"}, {"pool": "cls"}])
def test_class_tokens_need_a_backbone_that_has_one(options):
    ((name, value),) = options.items()
    model = tiny_model(global_pool="avg", class_token=False)
    with pytest.raises(
        UserError, match=f"method.{name}={value} needs a class token, which this backbone does not have"
    ):
        tiny_classifier("vpt_deep", model=model, **options)
