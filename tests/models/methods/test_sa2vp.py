"""SA2VP: image and prompts side by side through the blocks, written out token by token."""

import pytest
import torch
from torch.nn import functional as F

from helpers.tiny import NUM_CLASSES, VIT_B_SIZE, geometry, images, relative_error, tiny_model, worst_error
from visprompt.errors import UserError
from visprompt.models.attention import last_attention
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.methods.sa2vp import SA2VP

TINY, VIT_B = geometry(), geometry(**VIT_B_SIZE)
LABELS = torch.tensor([0, 3, 1])
EVEN = torch.full((3,), 1 / 3)


def classifier(depth=4, model=None, **options):
    torch.manual_seed(1)
    backbone = ViT(tiny_model(depth=depth) if model is None else model)
    made = Classifier(
        backbone, SA2VP(backbone, **{"inner": 6, "scale": 0.3, "dropout": 0.0} | options), NUM_CLASSES
    )
    with torch.no_grad():
        for _, parameter in made.tuned_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.train()


def gradients(model, loss):
    names, parameters = zip(*model.tuned_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def grid_neighbours(place, side=4):
    """Of a patch, counted from 1 as tokens are, by the rows and columns around it."""
    row, column = divmod(place - 1, side)
    around = [(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return [1 + i * side + j for i, j in around if 0 <= i < side and 0 <= j < side]


def reads(model, index, reader, source):
    """What the tokens of one sequence make of the other's, one query at a time."""
    block, method = model.backbone.model.blocks[index], model.method
    weights = block.attn.qkv.weight.split(32), block.attn.qkv.bias.split(32)
    a, b = block.norm1(reader), block.norm1(source)
    q, k, v = (F.linear(x, w, c) for x, w, c in zip((a, b, b), *weights, strict=True))
    rows = []
    for place in range(q.shape[1]):
        seen = grid_neighbours(place) if place else list(range(q.shape[1]))
        heads = []
        for part in (slice(0, 16), slice(16, 32)):
            scores = q[:, place, None, part] @ k[:, seen, part].transpose(1, 2) / 4
            heads.append((scores.softmax(dim=-1) @ v[:, seen, part])[:, 0])
        rows.append(torch.cat(heads, dim=-1))
    out = reader + block.attn.proj(torch.stack(rows, dim=1))
    mean, variance = out.mean(-1, keepdim=True), out.var(-1, keepdim=True, unbiased=False)
    out = (out - mean) / (variance + 1e-6).sqrt() * method.norm_weight[index] + method.norm_bias[index]
    hidden = F.gelu(out @ method.down[index].T + method.down_bias[index])
    return hidden @ method.up[index].T + method.up_bias[index]


def naive(model, x):
    """Logits of the image, and those of its prompts."""
    method, vit = model.method, model.backbone.model
    maps = [a @ w.T + b for a, w, b in zip(method.maps, method.lift, method.lift_bias, strict=True)]
    image = vit._pos_embed(vit.patch_embed(x))
    prompts = (maps[0] + vit.pos_embed).expand(len(x), -1, -1)
    for i, block in enumerate(vit.blocks):
        if i in (0, 4, 8):
            after = block(prompts) + method.scale * reads(model, i, prompts, image)
            if i:
                after = after + block(maps[i // 4].expand(len(x), -1, -1)) * method.gates[i // 4 - 1]
            image, prompts = block(image), after
        else:
            image, prompts = block(image) + method.scale * reads(model, i, image, prompts), block(prompts)
    return tuple(
        model.head(vit.forward_head(vit.norm(tokens), pre_logits=True)) for tokens in (image, prompts)
    )


@pytest.mark.parametrize("depth", [2, 4, 10])
@pytest.mark.parametrize("options", [{}, {"prompt_weight": 0.0}, {"prompt_weight": 0.7, "scale": 1.5}])
def test_logits_loss_and_gradients_are_those_of_the_equations(depth, options):
    model = classifier(depth, **options)
    share = model.method.prompt_weight
    logits = model(images(3))
    loss = (model.losses(logits, LABELS, EVEN) * EVEN).sum()
    of_image, of_prompts = naive(model, images(3))
    whole = (1 - share) * F.cross_entropy(of_image, LABELS) + share * F.cross_entropy(of_prompts, LABELS)
    assert relative_error(logits, of_image) < 1e-5
    assert abs(loss - whole) < 1e-5 * abs(whole)
    assert worst_error(gradients(model, loss), gradients(model, whole)) < 1e-5
    assert relative_error(model.eval()(images(3)), of_image) < 1e-5


def test_average_pooling_pools_the_prompts_as_the_image():
    model = classifier(model=tiny_model(global_pool="avg"))
    loss = (model.losses(model(images(3)), LABELS, EVEN) * EVEN).sum()
    of_image, of_prompts = naive(model, images(3))
    whole = 0.8 * F.cross_entropy(of_image, LABELS) + 0.2 * F.cross_entropy(of_prompts, LABELS)
    assert abs(loss - whole) < 1e-5 * abs(whole)


def test_a_prompt_is_aligned_with_its_patch():
    """What the paper promises: a patch reads the prompts around its own place, and no others."""
    model = classifier(depth=2).eval()
    reader, source = torch.randn(2, 1, 17, 32, generator=torch.Generator().manual_seed(0))
    before = model.method._read(1, reader, source)
    changed = source.clone()
    changed[:, 6] += 1  # the patch in row 1 and column 1 of 4
    moved = (model.method._read(1, reader, changed) != before).any(dim=-1)[0]
    assert moved.nonzero().flatten().tolist() == [0, 1, 2, 3, 5, 6, 7, 9, 10, 11]


def test_attention_maps_are_of_the_block_s_own_attention():
    model, seen = classifier().eval(), []
    last = model.backbone.blocks[-1]
    with torch.no_grad():
        hook = last.norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(images())
        hook.remove()
        tokens = torch.cat(seen[2:], dim=1)  # behind the two sequences that the prompts are read through
        q, k, _ = last.attn.qkv(last.norm1(tokens)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        expected = (q[:, :, :1] @ k.mT)[:, :, 0] / 4
        found = last_attention(model, images())
    weights = torch.cat([found.prefix, found.patches.flatten(2)], dim=-1)
    assert relative_error(weights, expected.softmax(dim=-1)) < 1e-5


def test_nothing_is_kept_behind_a_prediction():
    model = classifier().eval()
    logits = model(images(3))
    assert not model.method._state
    assert torch.equal(model.losses(logits, LABELS, EVEN), F.cross_entropy(logits, LABELS, reduction="none"))
    model.train()(images(3))
    model.losses(logits, LABELS, EVEN)
    assert not model.method._state


def test_dropout_is_drawn_in_training_only():
    model = classifier(dropout=0.5)
    assert not torch.equal(model(images(3)), model(images(3)))
    model.eval()
    assert torch.equal(model(images(3)), model(images(3)))


@pytest.mark.parametrize("inner", [8, 16, 64])
def test_counts_on_vit_b(inner):
    maps = 3 * (197 * inner + inner * 768 + 768) + 2 * 768
    mlps = 12 * (2 * 768 + 768 * inner + inner + inner * 768 + 768)
    assert sum(p.numel() for p in SA2VP(VIT_B, inner=inner).parameters()) == maps + mlps


def test_first_values_are_those_of_the_released_code():
    torch.manual_seed(0)
    method = SA2VP(VIT_B, inner=16)
    assert method.maps.std().item() == pytest.approx(0.02, rel=0.03)
    assert method.gates.std().item() == pytest.approx(0.02, rel=0.1)
    bound = (6 / (768 + 16)) ** 0.5
    for weights in (method.lift, method.down, method.up):
        assert 0.999 * bound < weights.abs().max() <= bound
    for biases in (method.lift_bias, method.down_bias, method.up_bias):
        assert biases.abs().max() < 1e-5
        assert biases.std().item() == pytest.approx(1e-6, rel=0.2)
    assert method.norm_weight.unique().tolist() == [1]
    assert method.norm_bias.unique().tolist() == [0]


def test_what_is_saved():
    keys = {"maps", "lift", "lift_bias", "norm_weight", "norm_bias", "down", "down_bias", "up", "up_bias"}
    keys |= {"head.weight", "head.bias"}
    assert set(classifier().tuned_state()) == keys
    assert set(classifier(8).tuned_state()) == keys | {"gates"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": 0}, "method.inner=0 is too small: give at least 1"),
        ({"scale": 0.0}, "method.scale=0.0 is not a positive finite number: give a number above 0"),
        ({"prompt_weight": 1.1}, "method.prompt_weight=1.1 is not a share: give a number from 0 to 1"),
        ({"dropout": 1.0}, "method.dropout=1.0 is not a probability"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        SA2VP(TINY, **options)


@pytest.mark.parametrize("depth", [1, 5])
def test_a_depth_at_which_nothing_reads_the_last_prompts_is_refused(depth):
    with pytest.raises(
        UserError, match=rf"method sa2vp cannot work on this backbone: in the last of its {depth}"
    ):
        classifier(depth)
