"""Reads what a search on a GPU has recorded; whatever cannot be used is passed over.

A record is another program's output, and may be older than the kernel or edited by hand: where it
is no use, a kernel is tiled as though nothing had been searched. The search is ``bench.hopper``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def read_record(path: Path) -> dict[str, Any]:
    """Returns a record, which has an object for each kind of device; an empty one if there is none.

    One that cannot be read is named in a warning.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read and is passed over: %s", path, error)
        return {}
    if not isinstance(found, dict):
        logger.warning("%s is no object of kinds of devices and is passed over", path)
        return {}
    return found


def numbers_of(
    record: dict[str, Any], kind: str, key: str, config: type, given: Iterable[str]
) -> dict[str, int] | None:
    """Returns what is recorded for a problem on a kind of device; None: nothing that is of use.

    Args:
        record: What ``read_record`` returned.
        kind: Of device, as it calls itself.
        key: Of the problem.
        config: A dataclass, of whose fields each is recorded as a number above 0, and no other.
        given: Those of its fields that follow from the device and are not recorded.
    """
    kinds = record.get(kind)
    found = kinds.get(key) if isinstance(kinds, dict) else None
    if not isinstance(found, dict):
        return None
    names = {field.name for field in fields(config)} - set(given)
    if set(found) != names or not all(type(n) is int and n > 0 for n in found.values()):
        logger.warning("the tiling recorded for %s, %s is passed over: %s", kind, key, found)
        return None
    return found
