"""Undoes a layout: reads a whole array of the mesh the way a loader fills it, box by box."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxserve.models.layout import Axes, Layout


def shrink(layout: Layout, array: Any, axes: Axes) -> np.ndarray:
    """Returns the checkpoint's array that ``layout.stretch`` made ``array`` of.

    Args:
        layout: of the mesh.
        array: of the sizes that it has there.
        axes: a word for each of its axes.
    """
    stretched = np.asarray(array)
    found = np.zeros(layout.true_shape(stretched.shape, axes), stretched.dtype)
    for place, true in layout.boxes(axes, tuple(slice(0, size) for size in stretched.shape)):
        found[true] = stretched[place]
    return found
