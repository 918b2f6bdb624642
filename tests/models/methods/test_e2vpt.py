"""E^2VPT: prompts in both places, and masks that take out exactly what they say."""

import pytest
import torch
from torch.nn import functional as F

from helpers.tiny import NUM_CLASSES, NUM_IMAGE, VIT_B_SIZE, geometry, images, tiny_model
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.methods import Flow
from visprompt.models.methods.e2vpt import E2VPT

SITES = frozenset({"tokens", "keys_values"})
TINY = geometry()
VIT_B = geometry(**VIT_B_SIZE)
SHARED = {
    "token_mask": [1, 0, 1],
    "segment_mask": [[1, 0, 1, 1, 0, 0, 1, 0], [1] * 8, [0, 1, 0, 1, 1, 0, 0, 1]],
}
PER_LAYER = {
    "mask_per_layer": True,
    "token_mask": [[1, 0, 1], [0, 1, 1], [1, 1, 0], [1, 1, 0]],
    "segment_mask": [torch.eye(8)[[i, i + 1, i + 2]].int().tolist() for i in range(4)],
}


def e2vpt(seed=1, model=None, exact=True, **options):
    torch.manual_seed(seed)
    backbone = ViT(model or tiny_model(), exact=exact)
    method = E2VPT(
        backbone, **{"num_tokens": 3, "num_kv_tokens": 2, "dropout": 0.0, "num_segments": 8} | options
    )
    classifier = Classifier(backbone, method, NUM_CLASSES)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if name != "prompts":
                parameter.normal_()
    return classifier


def naive(classifier, x, prompts, before=False):
    """Logits by the equations: every token carried, attention written out, key-value rows beside the projected ones.

    `prompts` holds the tokens [p, width] of each layer that has some.
    """
    model, method = classifier.backbone.model, classifier.method
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    count = 0
    for i, block in enumerate(model.blocks):
        if i < len(prompts) or (i == len(prompts) and not method.carry_over):
            x, count = x[:, :NUM_IMAGE], 0
        if i < len(prompts):
            x = torch.cat([x, prompts[i].expand(len(x), -1, -1)], 1)
            count = len(prompts[i])
        x = x + attention(block.attn, block.norm1(x), method, i, before)
        x = x + block.mlp(block.norm2(x))
    assert x.shape[1] == NUM_IMAGE + count
    return classifier.head(model.fc_norm(model.norm(x)[:, 0]))


def attention(attn, x, method, i, before):
    q, k, v = attn.qkv(x).reshape(len(x), -1, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if i in method.kv_blocks:
        layer, own = method.kv_blocks.index(i), dict(method.named_parameters())
        rows = [
            own.get(name, own.get("kv_prompts"))[layer].expand(len(x), -1, -1, -1)
            for name in ("k_prompts", "v_prompts")
        ]
        k, v = (torch.cat([r, t] if before else [t, r], 2) for r, t in zip(rows, (k, v), strict=True))
    shares = (q @ k.transpose(-2, -1) * attn.head_dim**-0.5).softmax(-1)
    return attn.proj((shares @ v).transpose(1, 2).flatten(2))


def measured(classifier, logits, wanted):
    loss = F.cross_entropy(logits, torch.arange(len(logits)) % NUM_CLASSES)
    return [logits.detach(), *torch.autograd.grad(loss, wanted)]


def close(a, b):
    for one, other in zip(a, b, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_kv": False},
        {"num_tokens": 0},
        {"num_kv_tokens": 0},
        {"depth": 2},
        {"depth": 1, "carry_over": True},
        {"kv_blocks": "first_half"},
        {"kv_blocks": "last_half", "num_tokens": 0},
        {"kv_blocks": "every_other", "share_kv": False},
        {"kv_blocks": [3, 1]},
    ],
)
def test_it_equals_the_equations(options, exact):
    classifier = e2vpt(exact=exact, model=tiny_model(qk_norm=True), **options)
    own = [p for _, p in classifier.tuned_parameters()]
    prompts = classifier.method.prompts if classifier.method.depth else []
    for before in (False, True):  # attention does not see the order of keys
        close(
            measured(classifier, classifier(images(3)), own),
            measured(classifier, naive(classifier, images(3), prompts, before), own),
        )


@pytest.mark.parametrize(
    "options",
    [{}, {"depth": 2}, {"share_kv": False, "kv_blocks": [1, 3]}, {"pool": "image_prompt"}, {"pool": "image"}],
)
@pytest.mark.parametrize("model", [{}, {"global_pool": "avg"}])
def test_carrying_the_tokens_gives_the_same_logits_and_computes_their_outputs_in_every_block(model, options):
    exact, carried = (e2vpt(exact=way, model=tiny_model(**model), **options) for way in (True, False))
    own, x = [[p for _, p in one.tuned_parameters()] for one in (exact, carried)], images(3)
    close(measured(exact, exact(x), own[0]), measured(carried, carried(x), own[1]))
    lengths = []
    for block in carried.backbone.model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    carried(x)
    assert lengths == [NUM_IMAGE + (3 if i < options.get("depth", 4) else 0) for i in range(4)]
    assert carried.backbone.carried_blocks() == [0, 1, 2, 3]
    assert carried.summary().macs > exact.summary().macs


@pytest.mark.parametrize(
    "masks", [SHARED, PER_LAYER, {"token_mask": [0, 1, 0]}, {"segment_mask": SHARED["segment_mask"]}]
)
@pytest.mark.parametrize("depth", [None, 1])
def test_pruned_equals_unpruned_with_tokens_left_out_and_segments_zeroed(masks, depth):
    if depth and masks is PER_LAYER:  # one layer's masks are those of all
        masks = {k: v if k == "mask_per_layer" else v[0] for k, v in masks.items()}
    options = {"depth": depth, "carry_over": depth == 1}
    whole, pruned = e2vpt(**options), e2vpt(**options, **masks)
    method, full = pruned.method, whole.method.prompts
    layers = len(full)
    tokens = method.token_mask.expand(layers, 3)
    segments = method.segment_mask.expand(layers, 3, 8)
    fine = segments.repeat_interleave(4, dim=-1)  # contiguous, 32 / 8 = 4 wide
    left = [(full[i] * fine[i])[tokens[i]] for i in range(layers)]
    others = [p for n, p in whole.tuned_parameters() if n != "method.prompts"]
    reference = measured(whole, naive(whole, images(3), left), [*others, full])
    others = [p for n, p in pruned.tuned_parameters() if n != "method.prompts"]
    found = measured(pruned, pruned(images(3)), [*others, method.prompts])
    reference[-1] = torch.stack([reference[-1][i][fine[i]] for i in range(layers)])
    close(found, reference)
    assert method.prompts.shape == (layers, int(fine[0].sum()))
    assert method.tokens(0, images(3)).shape == (1, int(tokens[0].sum()), 32)  # a pruned token is gone
    assert method.kept_tokens == int(tokens[0].sum())


def test_masks_keep_initial_values_bit_for_bit_and_change_no_other_draw():
    whole, pruned = e2vpt(), e2vpt(**SHARED)
    parts = whole.method.prompts.unflatten(-1, (8, 4))
    kept = parts[:, pruned.method.segment_mask].flatten(1)
    assert torch.equal(pruned.method.prompts, kept)
    assert torch.equal(pruned.method.kv_prompts, whole.method.kv_prompts)
    assert torch.equal(pruned.head.weight, whole.head.weight)


def test_a_state_with_other_masks_is_refused_even_where_the_shapes_are_equal():
    pruned = e2vpt(**SHARED)
    other = e2vpt(seed=5, token_mask=[1, 1, 0], segment_mask=[*SHARED["segment_mask"][::2], [1] * 8])
    assert other.method.prompts.shape == pruned.method.prompts.shape
    before = other.tuned_state()["prompts"].clone()
    with pytest.raises(UserError, match="the mask token_mask differs; build it with the state's options"):
        other.load_tuned_state(pruned.tuned_state())
    assert torch.equal(other.tuned_state()["prompts"], before)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"prompts": (4, 3, 32), "kv_prompts": (4, 2, 2, 16)}),
        (
            {"share_kv": False, "depth": 2},
            {"prompts": (2, 3, 32), "k_prompts": (4, 2, 2, 16), "v_prompts": (4, 2, 2, 16)},
        ),
        ({"num_tokens": 0, "kv_blocks": "last_half"}, {"kv_prompts": (2, 2, 2, 16)}),
        ({"num_kv_tokens": 0}, {"prompts": (4, 3, 32)}),
        (
            SHARED,
            {"prompts": (4, 32), "kv_prompts": (4, 2, 2, 16), "token_mask": (3,), "segment_mask": (3, 8)},
        ),
        (
            PER_LAYER,
            {"prompts": (4, 8), "kv_prompts": (4, 2, 2, 16), "token_mask": (4, 3), "segment_mask": (4, 3, 8)},
        ),
    ],
)
def test_names_and_shapes_of_what_is_saved(options, names):
    classifier = e2vpt(**options)
    state = classifier.tuned_state()
    assert {n: tuple(t.shape) for n, t in state.items()} == names | {
        "head.weight": (5, 32),
        "head.bias": (5,),
    }
    again = e2vpt(seed=9, **options)
    assert not torch.equal(again(images()), classifier(images()))
    again.load_tuned_state(state)
    assert torch.equal(again(images()), classifier(images()))
    classifier(images()).sum().backward()
    with_gradient = {n for n, p in classifier.named_parameters() if p.grad is not None}
    assert with_gradient == set(classifier.tuned_names)
    summary = classifier.summary()
    masks = {"token_mask", "segment_mask"}
    assert summary.tuned == sum(t.numel() for n, t in state.items() if n not in masks and "head" not in n)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"num_tokens": 10, "num_kv_tokens": 5}, 9216 * 15),  # 9216 p + 9216 T
        ({"num_tokens": 7, "num_kv_tokens": 4, "share_kv": False}, 9216 * 15),
        ({"num_tokens": 5, "num_kv_tokens": 5, "depth": 1}, 768 * 5 + 9216 * 5),
        ({"num_tokens": 0, "num_kv_tokens": 5}, 9216 * 5),
        ({"num_tokens": 4, "num_kv_tokens": 5, "token_mask": [0, 1, 0, 1]}, 9216 * 7),
        (
            {"num_tokens": 2, "num_kv_tokens": 1, "segment_mask": [[1] * 4 + [0] * 12, [0] * 12 + [1] * 4]},
            9216 * 2 // 4 + 9216,
        ),
    ],
)
def test_counts_are_the_papers(options, count):
    assert sum(p.numel() for p in E2VPT(VIT_B, **options).parameters()) == count


def test_key_value_prompts_are_drawn_from_the_released_codes_range():
    torch.manual_seed(0)
    method = E2VPT(VIT_B, num_tokens=1, num_kv_tokens=5, share_kv=False)
    bound = (6 / (64 * 5)) ** 0.5
    for prompts in (method.k_prompts, method.v_prompts):
        assert bound * 0.999 < prompts.abs().max() <= bound
        assert prompts.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    reference = torch.empty(12, 5, 64)
    torch.nn.init.kaiming_uniform_(reference, a=0, mode="fan_in", nonlinearity="leaky_relu")
    assert reference.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert not torch.equal(method.k_prompts, method.v_prompts)
    assert 0.999 * 0.0625 < method.prompts.abs().max() <= 0.0625


def test_where_prompts_enter_and_what_is_frozen_before():
    E, K, D = Flow.ENTER, Flow.KEEP, Flow.DROP
    assert E2VPT(TINY).token_flow() == (E, E, E, E)
    assert E2VPT(TINY, depth=2).token_flow() == (E, E, D, K)
    assert E2VPT(TINY, depth=1, carry_over=True).token_flow() == (E, K, K, K)
    alone = E2VPT(TINY, num_tokens=0, kv_blocks="last_half")
    assert alone.token_flow() == (K, K, K, K)
    assert (alone.kv_blocks, alone.first_block) == ((2, 3), 2)
    assert [E2VPT(TINY, kv_blocks=w).kv_blocks for w in ("all", "first_half", "every_other")] == [
        (0, 1, 2, 3),
        (0, 1),
        (0, 2),
    ]
    assert E2VPT(TINY, kv_blocks="last_half").first_block == 0


def test_the_frozen_prefix_gives_the_same_logits():
    classifier = e2vpt(num_tokens=0, kv_blocks="last_half")
    tokens = classifier.frozen(images())
    assert torch.allclose(classifier(tokens), classifier(images()), atol=1e-6)


def test_dropout_is_drawn_for_every_image_over_what_is_left():
    method = e2vpt(dropout=0.5, **SHARED).method.train()
    tokens = method.tokens(1, images(4)).detach()
    assert tokens.shape == (4, 2, 32)
    assert not torch.equal(tokens[0], tokens[1])
    assert torch.equal(method.eval().tokens(1, images(4)), method.eval().tokens(1, images(2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_tokens": 0, "num_kv_tokens": 0},
            "leaves no prompt: give at least one of them 1 or more, or use method=li",
        ),
        ({"num_tokens": -1}, "method.num_tokens=-1 with method.num_kv_tokens=5 leaves no prompt"),
        ({"depth": 5}, "method.depth=5 does not fit: give 1 to 4, the backbone's blocks"),
        ({"dropout": 1.0}, "method.dropout=1.0 is not a probability"),
        ({"kv_blocks": "last_haf"}, "unknown method.kv_blocks 'last_haf': did you mean last_half"),
        (
            {"kv_blocks": [0, 4]},
            r"method.kv_blocks=\[0, 4\] does not fit: give a word \(all, first_half, last_half, every_o",
        ),
        ({"kv_blocks": [1, 1]}, r"method.kv_blocks=\[1, 1\] does not fit"),
        ({"kv_blocks": []}, r"method.kv_blocks=\[\] does not fit"),
        (
            {"kv_blocks": "nonsense", "num_kv_tokens": 0},
            "unknown method.kv_blocks 'nonsense': choose one of all, ev",
        ),
        ({"num_segments": 0}, "method.num_segments=0 is too small: give at least 1"),
        ({"num_segments": 5, "prune": True}, "method.num_segments=5 does not divide the backbone's width 32"),
        ({"num_tokens": 0, "prune": True}, "method.num_tokens=0 leaves nothing to prune"),
        (
            {"prune_tokens": [10, 100]},
            r"method.prune_tokens=\[10, 100\] holds 100: give whole percentages from 0 to 99",
        ),
        ({"prune_segments": [0.5]}, r"method.prune_segments=\[0.5\] holds 0.5"),
        ({"prune_tokens": 50}, r"method.prune_tokens=50 is not a list: give \[50\]"),
        ({"token_mask": [1, 1]}, "method.token_mask does not fit: give 0 or 1 for each of 5"),
        ({"token_mask": [1, 1, 2, 1, 1]}, "method.token_mask does not fit"),
        ({"segment_mask": [[1], [1, 0]]}, "method.segment_mask does not fit: give 0 or 1 for each of 5 x 16"),
        (
            {"token_mask": [1] * 5, "mask_per_layer": True},
            "method.token_mask does not fit: give 0 or 1 for each of 4 x 5",
        ),
        ({"token_mask": [0] * 5}, "leave a token or a layer without values"),
        ({"segment_mask": [[0] * 16] * 5}, "leave a token or a layer without values"),
        (
            {"mask_per_layer": True, "token_mask": [[1, 1, 1, 1, 0]] * 3 + [[1] * 5]},
            "keep more in one layer than in another",
        ),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        E2VPT(TINY, **options)
