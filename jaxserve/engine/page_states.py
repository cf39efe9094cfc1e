"""A picture of a page pool, one byte a page, for those who draw it.

Apart from ``pages.py``, which clients import by a chain of types and which has no use for arrays.
"""

from __future__ import annotations

import numpy as np

from jaxserve.engine.pages import PagePool

CACHED = 255
"""What is below are numbers of holders."""


def page_states(pool: PagePool) -> np.ndarray:
    """Returns the state of every page from 1 on, as uint8; engine thread only.

    0 is a free page, ``CACHED`` a cached one, and every other number how many hold a used one (254:
    so many or more).
    """
    holders, cached = pool.picture()
    states = np.minimum(np.frombuffer(holders, np.intc), CACHED - 1).astype(np.uint8)
    states[np.fromiter(cached, np.intp, len(cached))] = CACHED
    return states[1:]
