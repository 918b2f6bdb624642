"""TensorFlow's two ways of resizing without antialias, written out as an independent reference."""

import numpy as np


def tensorflow(image: np.ndarray, size: int, half_pixel_centres: bool) -> np.ndarray:
    """tf.image.resize(method="bilinear") of TensorFlow 2, or, without half-pixel centres, of TensorFlow 1.

    Args:
        image: [height, width].
        size: Side of the result.
        half_pixel_centres: Whether pixel i lies at i + 0.5.

    Returns:
        float64 [size, size].
    """
    return _lines(_lines(image.astype(float), size, half_pixel_centres).T, size, half_pixel_centres).T


def _lines(image: np.ndarray, size: int, half_pixel_centres: bool) -> np.ndarray:
    """`size` lines, each between two lines of the image."""
    shift, last = 0.5 if half_pixel_centres else 0.0, len(image) - 1
    lines = []
    for line in range(size):
        place = (line + shift) * len(image) / size - shift
        above = int(np.floor(place))
        first, second = image[min(max(above, 0), last)], image[min(max(above + 1, 0), last)]
        lines.append(first + (second - first) * (place - above))
    return np.stack(lines)
