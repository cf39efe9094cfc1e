"""What tests of several hosts share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jaxserve.runner.group import Group
from tests.runner.gathering import configs, gather


@pytest.fixture
def groups() -> Iterator[list[Group]]:
    found = gather(configs(3))
    yield found
    for group in found:
        group.close()
