"""A batch that mixes tasks gives each image the logits of its own classifier."""

import gc
import re
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch._dynamo.utils import counters
from torch.nn import functional as F

import visprompt
from helpers.pairs import options, working
from helpers.tiny import RECORD, relative_error
from visprompt.data.sources.decoders import decoder_of
from visprompt.data.transforms import to_input
from visprompt.errors import UserError
from visprompt.models.attention import last_attention
from visprompt.models.backbones import DEMO
from visprompt.models.methods import METHODS
from visprompt.models.methods.describe import MEMBERS, member
from visprompt.models.tuned_state import TunedState

# what tasks of one method differ in
VARIANTS = {
    "vpt_deep": [
        {"num_tokens": 1},
        {"num_tokens": 7, "pool": "image_prompt"},
        {"num_tokens": 3, "depth": 1},
        {"num_tokens": 2, "depth": 1, "depth_from": "last", "pool": "prompt"},
        {"location": "add"},
        {"location": "prepend_pixel", "depth": 1, "dropout": 0.0, "pool": "image"},
    ],
    "vpt_shallow": [
        {"num_tokens": 2},
        {"num_tokens": 5, "pool": "image_prompt"},
        {"location": "concat_channel"},
    ],
    "e2vpt": [{"num_tokens": 4, "num_kv_tokens": 2}, {"num_tokens": 0, "num_kv_tokens": 3, "kv_blocks": [1]}],
    "cvpt": [{"num_tokens": 1}, {"num_tokens": 4}],
    "vapt": [{"num_tokens": 2}, {"num_tokens": 5}],
    "vpt_gated": [{"num_tokens": 2, "pool": "image_prompt"}, {"num_tokens": 4, "temperature": False}],
}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "bank.md"


def backbone(family):
    """A member of a family with weights so large that every part matters to the output."""
    model, noise = member(family), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return model


def tuned(model, method, classes=3, seed=0, **chosen):
    """A tuned state and its classifier."""
    torch.manual_seed(seed)
    classifier = visprompt.build(model, method, classes, **chosen)
    with torch.no_grad():
        for _, parameter in classifier.tuned_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return _state_of(classifier), classifier.eval()


def images(count, side=32, seed=3):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def banks():
    """For each family a bank of all methods, and each task's own classifier."""
    made = {}

    def of(family):
        if family not in made:
            model = backbone(family)
            bank, alone = visprompt.Bank(model), {}
            for i, method in enumerate(sorted(working(family))):
                for j, chosen in enumerate(VARIANTS.get(method, [{}]) if family == "ViT" else [{}]):
                    state, classifier = tuned(
                        model, method, 2 + (i + j) % 4, i + 7 * j, **options(method, family) | chosen
                    )
                    bank.add(f"{method} {j}", state)
                    alone[f"{method} {j}"] = classifier
            made[family] = bank, alone
        return made[family]

    return of


def check(bank, alone, x, names, bound=1e-5):
    out = bank(x, names)
    with torch.inference_mode():
        for image, name, logits in zip(x, names, out, strict=True):
            expected = alone[name](image[None])[0]
            assert logits.shape == expected.shape
            assert relative_error(logits, expected) < bound, name


@pytest.mark.parametrize(
    "family",
    # one family of each forward is fast
    [
        family if family in ("ViT", "Swin") else pytest.param(family, marks=pytest.mark.slow)
        for family in MEMBERS
    ],
)
def test_every_method_in_one_batch(banks, family):
    bank, alone = banks(family)
    side = int(next(iter(alone.values())).backbone.image_size)
    # each task has two images, which do not lie side by side
    names = [*sorted(alone), *sorted(alone, key=lambda name: name[::-1])]
    check(bank, alone, images(len(names), side), names)
    if family == "ViT":
        # the last row of the page's table; and the variant with further channels
        own_pass = {name.removesuffix(" 0") for name in alone if not bank.task(name).shares}
        assert own_pass == {*methods_of_the_page()[-1], "vpt_shallow 2"}


def methods_of_the_page():
    """The methods of each row of the page's table."""
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [re.findall("`([a-z0-9_]+)`", row) for row in rows]


def test_the_page_has_every_method_once():
    assert sorted(method for row in methods_of_the_page() for method in row) == sorted(METHODS)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_mixture(banks, data):
    bank, alone = banks("ViT")
    names = data.draw(st.lists(st.sampled_from(sorted(alone)), min_size=1, max_size=12))
    check(bank, alone, images(len(names), seed=data.draw(st.integers(0, 99))), names)


@pytest.mark.parametrize("family", ["Swin", pytest.param("DINOv3", marks=pytest.mark.slow)])
def test_any_mixture_of_another_family(banks, family):
    bank, alone = banks(family)
    side = int(next(iter(alone.values())).backbone.image_size)
    draw = torch.Generator().manual_seed(0)
    for seed in range(5):
        chosen = torch.randint(len(alone), (6,), generator=draw).tolist()
        check(bank, alone, images(6, side, seed), [sorted(alone)[i] for i in chosen])


def test_one_attention_for_each_block_whatever_the_batch_mixes(banks, monkeypatch):
    bank, alone = banks("ViT")
    calls, original = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape[0]) or original(*a, **k)
    )
    # also timm's own blocks call it by this name
    names = [name for name in alone if bank.task(name).shares and "cvpt" not in name]
    bank(images(len(names)), names)
    assert calls == [len(names)] * bank.module.num_blocks
    calls.clear()
    names += ["cvpt 0", "cvpt 1"]  # image tokens attend to these prompts in a second one
    bank(images(len(names)), names)
    assert calls == [len(names), 2] * bank.module.num_blocks


def test_a_request_projects_no_prompt(banks):
    bank, _ = banks("ViT")
    seen = []
    hooks = [
        block.norm1.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
        for block in bank.module.model.blocks
    ]
    bank(images(4), ["vpt_deep 0", "e2vpt 0", "vfpt 0", "vpt_low_rank 0"])
    for hook in hooks:
        hook.remove()
    # class token and 16 patches; in the last block the class token is read, and the patches are context
    assert seen == [17] * (bank.module.num_blocks - 1) + [1, 16]


def test_bfloat16_comes_close(banks):
    model = backbone("ViT")
    _, alone = banks("ViT")
    bank = visprompt.Bank(model, dtype=torch.bfloat16)
    names = []
    for name in (
        "vpt_deep 0",
        "vpt_deep 1",
        "vpt_shallow 0",
        "vapt 0",
        "lora 0",
        "adapter 0",
        "linear 0",
        "bias 0",
    ):
        classifier = alone[name]
        state = _state_of(classifier)
        bank.add(name, state)
        names.append(name)
    x = images(2 * len(names))
    with torch.inference_mode():
        for image, name, logits in zip(x, names * 2, bank(x, names * 2), strict=True):
            assert logits.dtype == torch.bfloat16
            # a bfloat16 has 8 bits: 2^-9 for each rounding, and 2^-4 after some hundred of them
            assert relative_error(logits.float(), alone[name](image[None])[0]) < 2**-4, name


def _state_of(classifier):
    named = {"method": classifier.origin.method, "backbone": classifier.origin.backbone}
    named |= {"class_names": tuple(f"c{i}" for i in range(classifier.num_classes))}
    return TunedState(
        **RECORD | named, tensors={name: tensor.clone() for name, tensor in classifier.tuned_state().items()}
    )


@pytest.mark.parametrize("family", ["ViT", "EVA-02"])
def test_attention_is_that_of_each_task_s_own_classifier(banks, family):
    bank, alone = banks(family)
    side = int(next(iter(alone.values())).backbone.image_size)
    for image, name in zip(images(len(alone), side), alone, strict=True):
        found, expected = (
            bank.attention(image, bank.task(name)),
            last_attention(alone[name].eval(), image[None]),
        )
        assert found.asking == expected.asking
        for part in ("prefix", "patches", "logits"):
            assert relative_error(getattr(found, part), getattr(expected, part)) < 1e-5, (name, part)
        # prompts whose outputs nothing reads are keys and values here
        added = [torch.cat([own.prompts, own.keys_values], dim=-1).sum(-1) for own in (found, expected)]
        assert (added[0] - added[1]).abs().max() < 1e-5, name
    check(bank, alone, images(len(alone), side), list(alone))


def test_attention_of_other_families_is_refused_in_one_sentence(banks):
    bank, _ = banks("Swin")
    with pytest.raises(UserError, match="attention maps need a class token or pooled tokens"):
        bank.attention(images(1)[0], bank.task("linear 0"))


def test_none_is_the_bare_backbone(banks):
    bank, _ = banks("ViT")
    model, x = backbone("ViT"), images(3)
    features, logits, again = bank(x, [None, "vpt_deep 1", None])
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    assert relative_error(torch.stack([features, again]), expected[[0, 2]]) < 1e-5
    assert logits.shape == (len(bank.task("vpt_deep 1").class_names),)
    assert bank(x[:0], []) == []


def test_pictures_are_prepared_as_their_task_says(banks):
    bank, alone = banks("ViT")
    state = _state_of(alone["vpt_deep 0"])
    other = dict(state.preprocessing) | {"mean": [0.2] * 3, "std": [0.3] * 3, "interpolation": "bicubic"}
    bank = visprompt.Bank(backbone("ViT"))
    bank.add("plain", state)
    bank.add("other", replace(state, preprocessing=other))
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    out = bank([pixels, Image.fromarray(pixels), to_input(pixels, other)], ["plain", "other", "other"])
    with torch.inference_mode():
        for logits, how in zip(out, (state.preprocessing, other, other), strict=True):
            expected = alone["vpt_deep 0"](to_input(pixels, how)[None])[0]
            assert relative_error(logits, expected) < 1e-5
    assert not torch.equal(out[0], out[1])


def test_a_file_is_decoded_as_its_task_says(banks, tmp_path):
    _, alone = banks("ViT")
    state = _state_of(alone["vpt_deep 0"])
    bank = visprompt.Bank(backbone("ViT"))
    bank.add("a", state)
    noise = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    Image.fromarray(noise).save(tmp_path / "a.jpg", exif=turned)
    expected = to_input(decoder_of(state.preprocessing)(tmp_path / "a.jpg"), state.preprocessing)
    path, content = tmp_path / "a.jpg", (tmp_path / "a.jpg").read_bytes()
    out = bank([path, content, Image.open(path), expected], "a")
    assert all(torch.equal(logits, out[-1]) for logits in out[:-1])
    clear = np.dstack([noise, np.arange(50 * 40, dtype=np.uint32).reshape(50, 40).astype(np.uint8)])
    Image.fromarray(clear, "RGBA").save(tmp_path / "a.png")
    from_file, from_picture = bank([tmp_path / "a.png", Image.open(tmp_path / "a.png")], "a")
    assert torch.equal(from_file, from_picture), "on white, both"


def test_a_norm_with_an_activation_behind_its_bias_keeps_it_there():
    torch.manual_seed(0)
    model = timm.create_model("skresnet18", num_classes=0).eval()
    state, classifier = tuned(model, "bias")
    bank = visprompt.Bank(model)
    assert not bank.add("a", state).shares
    x = images(2, 64)
    with torch.inference_mode():
        assert relative_error(torch.stack(bank(x, "a")), classifier(x)) < 1e-5


def test_rectangles_on_a_backbone_with_rotary_positions():
    name, how = MEMBERS["DINOv3"]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **how | {"dynamic_img_size": True}).eval()
    state, classifier = tuned(model, "vpt_deep", num_tokens=2)
    bank = visprompt.Bank(model)
    bank.add("a", state)
    side = int(classifier.backbone.image_size)
    x = torch.randn(2, 3, side, 2 * side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert relative_error(torch.stack(bank(x, "a")), classifier(x)) < 1e-5


@pytest.mark.parametrize(("method", "extra"), [("cvpt", 2 * 4), ("vapt", 0)])
def test_what_is_computed_once_counts_as_memory(method, extra):
    model = backbone("ViT")
    state, classifier = tuned(model, method, 3, num_tokens=4)
    task = visprompt.Bank(model).add("a", state)
    geometry = classifier.backbone
    stored = sum(tensor.nbytes for tensor in state.tensors.values())
    # cvpt: keys and values of 4 prompts in each block; vapt: a matrix [4, patches] in each block but the first
    frozen = extra * geometry.width * geometry.num_blocks
    if method == "vapt":
        frozen = (
            4 * 16 * (geometry.num_blocks - 1) + 2 * 4 * geometry.width
        )  # and the first block's keys, values
    assert abs(task.nbytes - stored - 4 * frozen) <= 8 * 4 * geometry.width


def test_nothing_keeps_a_task_that_was_removed(banks):
    _, alone = banks("ViT")
    bank = visprompt.Bank(backbone("ViT"))
    bank.add("a", _state_of(alone["lora 0"]))
    bank(images(1), "a")
    kept = weakref.ref(bank.task("a").prepared.method)
    bank.remove("a")
    gc.collect()
    assert kept() is None


def test_images_of_another_size_have_a_pass_of_their_own():
    name, how = MEMBERS["ViT"]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, dynamic_img_size=True, **how).eval()
    bank = visprompt.Bank(model)
    state, classifier = tuned(model, "vpt_deep", num_tokens=2)
    bank.add("a", state)
    mixed = [images(1, size)[0] for size in (32, 48, 32)]
    with torch.inference_mode():
        for image, logits in zip(mixed, bank(mixed, "a"), strict=True):
            assert relative_error(logits, classifier(image[None])[0]) < 1e-5


@pytest.mark.slow
def test_a_new_task_compiles_nothing(files):
    """Whatever its length, and whatever a batch mixes; a batch of one image has a graph of its own."""
    plain, compiled = visprompt.Bank(DEMO), visprompt.Bank(DEMO, compile=True)
    counters.clear()

    def both(names):
        for bank in (plain, compiled):
            for name in set(names) - set(bank.names):
                torch.manual_seed(len(name))
                classifier = visprompt.build(DEMO, "vpt_deep", 3, num_tokens=len(name))
                visprompt.save(classifier, files["a"][0].parent / name, class_names=("x", "y", "z"))
                bank.add(name, files["a"][0].parent / name)
        x = images(len(names), 64)
        for one, other in zip(plain(x, names), compiled(x, names), strict=True):
            assert relative_error(other, one) < 1e-5
        return counters["stats"]["unique_graphs"]

    graphs = both(["five5", "ten" * 3, "five5", "five5"])
    assert graphs > 0
    for names in (["n", "five5"], ["n", "n", "n"], ["long" * 10, "n", "ten" * 3], ["five5", "five5"]):
        assert both(names) == graphs
    torch.manual_seed(0)
    classifier = visprompt.build(DEMO, "lora", 3)
    visprompt.save(classifier, files["a"][0].parent / "lora", class_names=("x", "y", "z"))
    for bank in (plain, compiled):
        bank.add("lora", files["a"][0].parent / "lora")
    assert both(["lora", "n"]) == graphs, "wrapped layers are not compiled"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three states of the embedded backbone in files, of equal size, and their classifiers."""
    folder, made = tmp_path_factory.mktemp("states"), {}
    for i, name in enumerate("abc"):
        torch.manual_seed(i)
        classifier = visprompt.build(DEMO, "vpt_deep", 3, num_tokens=4).eval()
        visprompt.save(classifier, folder / f"{name}.safetensors", class_names=("x", "y", "z"))
        made[name] = folder / f"{name}.safetensors", classifier
    return made


def test_the_budget_in_bytes_evicts_what_was_used_longest_ago(files):
    bank = visprompt.Bank(DEMO)
    size = bank.add("a", files["a"][0]).nbytes
    # keys and values of 4 prompts in 6 blocks, and the head
    blocks, width = bank.module.num_blocks, bank.module.width
    assert size == 4 * (2 * 4 * width * blocks + 3 * width + 3)
    bank.budget = 2 * size
    bank.add("b", files["b"][0])
    bank(images(1, 64), "a")
    bank.add("c", files["c"][0])
    assert (bank.loaded, bank.names, bank.nbytes) == (["a", "c"], ["a", "b", "c"], 2 * size)
    # what was evicted returns from its file
    check(bank, {name: classifier for name, (_, classifier) in files.items()}, images(3, 64), ["b", "a", "c"])
    assert bank.nbytes == 2 * size


def test_what_is_pinned_is_never_evicted(files):
    bank = visprompt.Bank(DEMO)
    size = bank.add("a", files["a"][0], pinned=True).nbytes
    bank.budget = 2 * size
    for name in "bcb":
        bank.task(name) if name in bank.names else bank.add(name, files[name][0])
        assert bank.loaded == ["a", name]
    bank.budget = size
    with pytest.raises(
        UserError, match=r"task 'd' takes [\d,]+ bytes, and the budget of .* give a larger budget"
    ):
        bank.add("d", files["c"][0])
    assert "d" not in bank.names


def test_a_file_that_is_gone_is_one_sentence(files, tmp_path):
    bank, path = visprompt.Bank(DEMO), tmp_path / "gone.safetensors"
    path.write_bytes(files["a"][0].read_bytes())
    size = bank.add("gone", path).nbytes
    bank.budget = size
    bank.add("b", files["b"][0])
    path.unlink()
    with pytest.raises(UserError, match=r"there is no tuned state at .*gone\.safetensors"):
        bank(images(1, 64), "gone")


def test_a_file_that_changed_meanwhile_is_not_taken_for_the_old_one(files, tmp_path, monkeypatch):
    bank, path = visprompt.Bank(DEMO), tmp_path / "a.safetensors"
    path.write_bytes(files["a"][0].read_bytes())
    monkeypatch.chdir(tmp_path)
    bank.budget = bank.add("a", "a.safetensors").nbytes
    monkeypatch.chdir(tmp_path.parent)
    bank.add("b", files["b"][0])
    check(bank, {"a": files["a"][1]}, images(1, 64), ["a"])  # the path that was given was relative
    bank.task("b")
    path.write_bytes(files["c"][0].read_bytes())
    with pytest.raises(
        UserError, match=r"a\.safetensors has changed since task 'a' was added: add it again$"
    ):
        bank(images(1, 64), "a")
    bank.add("a", path)
    check(bank, {"a": files["c"][1]}, images(1, 64), ["a"])


def test_adding_draws_nothing_from_the_generator_of_others(files):
    bank = visprompt.Bank(DEMO)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    bank.add("a", files["a"][0])
    assert torch.equal(torch.rand(3), expected)


def test_a_state_of_another_backbone_is_refused(files):
    state, _ = tuned(backbone("ViT"), "vpt_deep")
    with pytest.raises(UserError, match=r"^other was tuned on backbone "):
        visprompt.Bank(DEMO).add("other", state)


def test_wrong_requests_are_one_sentence(banks):
    bank, _ = banks("ViT")
    for x, tasks, sentence in [
        (images(1), ["vpt_deap 0"], r"unknown task 'vpt_deap 0': did you mean vpt_deep 0"),
        (images(2), ["vpt_deep 0"], r"^1 tasks for 2 images: give each image its task"),
        ([images(1)], ["vpt_deep 0"], r"one of these is torch\.float32 of the shape \(1, 3, 32, 32\)"),
        ([np.zeros((9, 9, 3), np.uint8)], [None], r"a picture without a task cannot be prepared"),
        (images(1, 40), ["vpt_deep 0"], r"takes images of size 32 x 32 only"),
        (images(1).byte(), ["vpt_deep 0"], r"one of these is torch\.uint8 of the shape \(3, 32, 32\)"),
        (
            [np.zeros((9, 9), np.uint8)],
            ["vpt_deep 0"],
            r"must be uint8 \[height, width, 3\], and one .* \(9, 9\)",
        ),
        ([np.zeros((9, 9, 3))], ["vpt_deep 0"], r"one of these is float64 of the shape \(9, 9, 3\)"),
        (
            [Image.new("I;16", (9, 9))],
            ["vpt_deep 0"],
            r"mode I;16 has more than 8 bits: give the path of its file",
        ),
    ]:
        with pytest.raises(UserError, match=sentence):
            bank(x, tasks)
    with pytest.raises(UserError, match="unknown task 'nix'"):
        bank.remove("nix")


def test_the_shared_weights_stay_as_they_are(banks):
    bank, _ = banks("ViT")
    expected = {n: t for n, t in backbone("ViT").state_dict().items() if not n.startswith("head.")}
    found = bank.module.model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert not any(parameter.requires_grad for parameter in bank.module.parameters())


def test_tasks_are_replaced_and_removed_while_others_compute(files):
    """A batch computes with whole tasks: those that it began with."""
    bank, x = visprompt.Bank(DEMO), images(2, 64)
    with torch.inference_mode():
        answers = {name: classifier(x) for name, (_, classifier) in files.items()}
    bank.add("steady", files["a"][0])
    bank.add("changing", files["b"][0])
    stop, wrong = threading.Event(), []

    def request():
        while not stop.is_set():
            steady, changing = bank(x, ["steady", "changing"])
            close = [relative_error(changing, answers[name][1]) < 1e-5 for name in "bc"]
            if not (relative_error(steady, answers["a"][0]) < 1e-5 and any(close)):
                wrong.append((steady, changing))

    def come_and_go(name):
        while not stop.is_set():
            bank.add(name, files["c"][0])
            bank.remove(name)

    threads = [threading.Thread(target=request) for _ in range(4)]
    threads += [threading.Thread(target=come_and_go, args=(f"guest {i}",)) for i in range(2)]
    for thread in threads:
        thread.start()
    for i in range(20):
        bank.add("changing", files["bc"[i % 2]][0])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert bank.names == ["steady", "changing"]


def test_a_merged_head_gives_the_logits_of_its_own():
    _, classifier = tuned(backbone("ViT"), "mlp", 4)
    head = classifier.head
    with torch.no_grad():
        for layer in head.hidden:
            if isinstance(layer, torch.nn.BatchNorm1d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
    x = torch.randn(7, head.in_features)
    with torch.no_grad():
        assert relative_error(head.merged()(x), head(x)) < 1e-5
    assert not any(isinstance(layer, torch.nn.BatchNorm1d) for layer in head.merged())
