"""The exported names, held still: adding one is a decision, taking one away a breaking change."""

from __future__ import annotations

import importlib

import pytest

import jaxserve

PUBLIC = {
    "LLM",
    "AsyncClient",
    "Client",
    "FinishReason",
    "JaxserveError",
    "SamplingParams",
    "ServeConfig",
    "__version__",
    "errors",
}


def test_the_exported_names_are_these_and_no_others() -> None:
    assert set(jaxserve.__all__) == PUBLIC
    assert set(dir(jaxserve)) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_exported_name_is_there(name: str) -> None:
    value = getattr(jaxserve, name)
    home = getattr(value, "__module__", None)
    if home is not None:
        assert getattr(importlib.import_module(home), name) is value


def test_a_name_that_is_not_exported_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'jaxserve' has no attribute 'Engine'"):
        _ = jaxserve.Engine  # pyright: ignore[reportAttributeAccessIssue]


ERRORS = """
CheckpointError ConfigError DeadlineExceededError DrainingError DuplicateRequestError
EngineDeadError ExecutablesError GroupError InvalidRequestError JaxserveError LaunchError
MemoryPlanError MeshError ModelNotFoundError NotOfferedError PromptTooLongError QueueFullError
RequestCancelledError RequestFailedError RequestNotFoundError RetryableError ShuttingDownError
SlowReaderError TokenizerError
UnsupportedModelError
"""


def test_the_errors_are_these() -> None:
    names = {name for name in vars(jaxserve.errors) if name.endswith("Error")}
    assert names == set(ERRORS.split())
