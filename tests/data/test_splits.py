from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visprompt.data.splits import md5_order, stratified
from visprompt.errors import UserError


def test_published_order_of_cifar():
    assert md5_order(range(50_000), "train")[:5] == [16399, 1680, 47917, 17307, 27051]


def test_published_order_of_text_keys():
    keys = [f"valid_{row}" for row in range(32_768)]
    assert md5_order(keys, "validation")[0] == "valid_3270"


@pytest.mark.parametrize(("images", "held"), [(3, 1), (5, 1), (14, 1), (15, 2), (24, 2), (25, 3), (100, 10)])
def test_every_class_is_cut_80_10_10(images, held):
    keys = [f"{name}/{number}.png" for name in "ab" for number in range(images)]
    parts = stratified(keys, [key[0] for key in keys])
    for name in "ab":
        count = Counter(part for key, part in zip(keys, parts, strict=True) if key[0] == name)
        assert count == {"train": images - 2 * held, "val": held, "test": held}


def test_the_cut_is_by_md5_of_the_key():
    keys = [f"a/{number}" for number in range(10)]
    part_of = dict(zip(keys, stratified(keys, ["a"] * 10), strict=True))
    assert [part_of[key] for key in md5_order(keys, "")] == ["train"] * 8 + ["val", "test"]


@settings(max_examples=25, deadline=None)
@given(st.permutations([f"{name}/{number}" for name in "abc" for number in range(4)]))
def test_the_order_of_the_listing_does_not_matter(keys):
    expected = sorted(keys)
    parts = dict(zip(keys, stratified(keys, [key[0] for key in keys]), strict=True))
    assert [parts[key] for key in expected] == stratified(expected, [key[0] for key in expected])


def test_a_class_too_small_to_cut_is_named():
    with pytest.raises(UserError, match=r"class 'b' has 2 of the 3 images"):
        stratified(["a/1", "a/2", "a/3", "b/1", "b/2"], list("aaabb"))
