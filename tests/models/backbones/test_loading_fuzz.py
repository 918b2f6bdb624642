"""Files of weights with damage at any place: one sentence, or every weight as it was written.

Nothing else.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_flax import release_arrays

from helpers.damage import bounded, damages, outcome, spoil
from helpers.tiny import tiny_model
from visprompt.models.backbones.weights.loading import load_file

pytestmark = pytest.mark.slow  # drawn files, 40 s in all

SMALL = {"depth": 1}
WRITERS = {
    "safetensors": lambda model, file: save_file(model.state_dict(), file),
    "pth": lambda model, file: torch.save(model.state_dict(), file),
    "ckpt": lambda model, file: torch.save(
        {"state_dict": model.state_dict(), "epoch": 3, "loops": {"a": [1]}}, file
    ),
    "npz": lambda model, file: np.savez(file, **release_arrays(model)),
}


@pytest.fixture(scope="module", params=WRITERS)
def written(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / f"w.{request.param}"
    WRITERS[request.param](tiny_model(**SMALL), file)
    return file, file.read_bytes()


@given(damage=damages())
@bounded
def test_a_damaged_file_is_one_sentence_or_fills_the_model_with_finite_numbers(written, damage):
    file, whole = written
    spoil(file, damage, whole)
    model, before = tiny_model(seed=1, **SMALL), tiny_model(seed=1, **SMALL).state_dict()
    _, sentence = outcome(load_file, model, file)
    if sentence:
        assert sentence.startswith(str(file))
        assert "\n" not in sentence
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    else:
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.text(max_size=5),
    st.sampled_from(
        [torch.ones(3), torch.ones(2, 3).to_sparse(), torch.ones(()), torch.ones(3, dtype=torch.bool)]
    ),
    st.sampled_from([torch.ones(3, device="meta"), torch.ones(3, dtype=torch.complex64), torch.ones(0, 3)]),
)
WORDS = st.sampled_from(
    ["state_dict", "model", "net", "cls_token", "pos_embed", "blocks", "0", "norm.weight", "teacher"]
)
TREES = st.recursive(
    LEAVES,
    lambda inside: (
        st.lists(inside, max_size=3) | st.dictionaries(WORDS | st.integers(0, 3), inside, max_size=4)
    ),
    max_leaves=12,
)
MARKS = (
    "embeddings.patch_embeddings.projection.weight",
    "visual.class_embedding",
    "mask_token",
    "register_tokens",
)


@given(tree=TREES, mark=st.sampled_from(["", *MARKS]), leaf=LEAVES)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_content_of_a_checkpoint_is_one_sentence(tmp_path, tree, mark, leaf):
    content = {mark: leaf, "norm.bias": tree} if mark else tree
    torch.save(content, tmp_path / "w.pth")
    _, sentence = outcome(load_file, tiny_model(**SMALL), tmp_path / "w.pth")
    assert sentence.startswith(str(tmp_path / "w.pth"))
    assert "\n" not in sentence


def test_a_checkpoint_that_holds_itself_is_one_sentence(tmp_path):
    content = {"a": torch.ones(3)}
    content["self"] = content
    torch.save(content, tmp_path / "w.pth")
    _, sentence = outcome(load_file, tiny_model(**SMALL), tmp_path / "w.pth")
    assert "does not fit this VisionTransformer: it lacks 18 of 18 weights" in sentence
