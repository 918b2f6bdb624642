"""Original files with damage at any place, in archives and in what these hold: content, or one sentence.

Nothing else.

That no damaged file is used is the business of the checksums, which prepare.py compares before it reads.
"""

import gzip
import io
import json
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_raw_fgvc import WRITERS, record, unpacked

from helpers.damage import damages, outcome
from helpers.miniatures import natural, specialized, structured
from visprompt.data.sources.fgvc import fgvc
from visprompt.data.sources.readers import READERS

COUNTS = {"train": 6, "validation": 4, "test": 4}
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHARES = st.floats(0, 1, exclude_max=True)


class Files(dict):
    """The bytes of files, too many to be shown by hypothesis."""

    def __repr__(self):
        return f"{len(self)} files"


def inside(data, damage, share):
    """A file whose content is damaged, and its archive whole; a file that is no archive is damaged itself."""
    if data.startswith(b"\x1f\x8b"):
        return gzip.compress(damage(gzip.decompress(data)), 1)
    if not data.startswith(b"PK"):
        return damage(data)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        for name in names:
            content = old.read(name)
            new.writestr(
                name, damage(content) if content and name == names[int(share * len(names))] else content
            )
    return out.getvalue()


@pytest.fixture(scope="module", params=READERS)
def miniature(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    writers = vars(natural) | vars(specialized) | vars(structured)
    writers[request.param](root, COUNTS, np.random.default_rng(0))
    return (
        root,
        READERS[request.param],
        Files((path, path.read_bytes()) for path in root.rglob("*") if path.is_file()),
    )


def read_all(reader, root):
    content = reader(root)
    return len(list(content.read({split: list(part.keys) for split, part in content.parts.items()})))


def assert_harmless(files, call, damage, share, within):
    path = sorted(files)[int(share * len(files))]
    path.write_bytes(inside(files[path], damage, share * 7 % 1) if within else damage(files[path]))
    try:
        found, sentence = outcome(*call)
    finally:
        path.write_bytes(files[path])
    assert found is not None or sentence
    assert "\n" not in sentence


@pytest.mark.slow
@given(damage=damages(), share=SHARES, within=st.booleans())
@few
def test_damage_to_an_original_file_is_one_sentence_or_read(miniature, damage, share, within):
    root, reader, files = miniature
    assert_harmless(files, (read_all, reader, root), damage, share, within)


@pytest.fixture(scope="module", params=WRITERS)
def lists(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("fgvc")
    unpacked(request.param, root, COUNTS)
    kinds = (".txt", ".mat", ".json", ".csv")
    files = Files((path, path.read_bytes()) for path in root.rglob("*") if path.suffix in kinds)
    return root, record(request.param), files


@pytest.mark.slow
@given(damage=damages(), share=SHARES)
@few
def test_damage_to_the_lists_of_a_dataset_is_one_sentence_or_read(lists, damage, share):
    root, spec, files = lists
    assert_harmless(files, (fgvc, root, spec), damage, share, False)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    root = tmp_path_factory.mktemp("birds")
    unpacked("cub200", root, COUNTS)
    return root, record("cub200")


@given(
    content=VALUES | st.dictionaries(st.sampled_from(["a.jpg", "../b.jpg", "/c", "\0", ""]), VALUES),
    deep=st.booleans(),
)
@few
def test_any_json_for_the_lists_of_a_dataset_is_one_sentence(birds, content, deep):
    root, spec = birds
    text = "[" * 100_000 if deep else json.dumps(content)
    for split in ("train", "val", "test"):
        (root / f"{split}.json").write_text(text)
    found, sentence = outcome(fgvc, root, spec)
    assert found is None
    assert sentence.startswith(str(root))
    assert "\n" not in sentence
