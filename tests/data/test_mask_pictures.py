"""Masks as pictures: the values of an indexed PNG are the classes, and its colours those of PASCAL VOC."""

import io

import numpy as np
from PIL import Image

from visprompt.data.mask_pictures import COLOURS, indexed_png, overlay


def test_colours_are_those_of_pascal_voc():
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        9: (192, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
    }
    assert {index: tuple(COLOURS[index].tolist()) for index in known} == known
    assert tuple(COLOURS[255].tolist()) == (224, 224, 192)
    assert len(np.unique(COLOURS, axis=0)) == 256


def test_a_program_reads_the_classes_and_a_viewer_shows_their_colours():
    labels = np.random.default_rng(0).integers(0, 256, (7, 11), dtype=np.uint8)
    with Image.open(io.BytesIO(indexed_png(labels))) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "P", (11, 7))
        assert np.array_equal(np.asarray(image), labels)
        assert np.array_equal(np.asarray(image.convert("RGB")), COLOURS[labels])


def test_an_overlay_is_the_mean_of_the_image_and_the_colours():
    image = np.array([[[255, 0, 100], [10, 20, 30]]], np.uint8)
    assert overlay(image, np.array([[1, 0]], np.uint8)).tolist() == [[[191, 0, 50], [5, 10, 15]]]
