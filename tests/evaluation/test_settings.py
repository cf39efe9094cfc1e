"""Names of settings, settings in free form, and what is said of bad ones."""

from __future__ import annotations

import pytest

from jaxserve.config import KV_DTYPES, QUANTIZATIONS
from jaxserve.errors import ConfigError
from jaxserve.evaluation import settings
from jaxserve.evaluation.settings import (
    NAMED,
    USUAL,
    known_names,
    parse_settings,
    usual_settings,
)


def test_a_name_is_the_unquantized_model_but_for_what_it_says() -> None:
    unquantized, cache, weights = parse_settings("unquantized, kv-int8,w4a16")
    assert unquantized.flags == {"quantization": "none", "kv_dtype": "auto"}
    assert cache.flags == {"quantization": "none", "kv_dtype": "int8"}
    assert (weights.name, weights.flags) == ("w4a16", {"quantization": "int4", "kv_dtype": "auto"})


def test_the_free_form_sets_any_of_the_flags() -> None:
    (mine,) = parse_settings("mine=--kv-dtype:int8+page-tokens:16+seed:3+model:dummy:tiny-llama")
    assert mine.name == "mine"
    assert mine.flags == {
        "quantization": "none",
        "kv_dtype": "int8",
        "page_tokens": 16,
        "seed": 3,
        "model": "dummy:tiny-llama",
    }


def test_the_usual_settings_are_those_that_this_version_has() -> None:
    usual = usual_settings().split(",")
    assert usual[0] == "unquantized"
    assert set(usual) == set(USUAL) & set(known_names())
    parse_settings(usual_settings())


def test_values_are_those_of_the_launch_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is there when its flag's value is, and no sooner."""
    monkeypatch.setitem(NAMED, "later", {"kv_dtype": "int1"})
    assert "later" not in known_names()
    with pytest.raises(ConfigError) as caught:
        parse_settings("later")
    assert str(caught.value) == (
        "setting 'later' needs --kv-dtype int1, which this version does not know; it knows "
        + ", ".join(KV_DTYPES)
    )
    monkeypatch.setitem(settings.CHOICES, "kv_dtype", (*KV_DTYPES, "int1"))
    assert "later" in known_names()
    assert parse_settings("later")[0].flags["kv_dtype"] == "int1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--settings is empty; name some of unquantized, float32,"),
        (" , ", "--settings is empty"),
        ("kv-in8", "there is no setting 'kv-in8'; did you mean kv-int8? Choose from unquantized,"),
        ("quick", "there is no setting 'quick'. Choose from unquantized, float32, bf16,"),
        ("bf16,bf16", "setting 'bf16' is given 2 times; give it once"),
        ("=dtype:float32", "setting '=dtype:float32' has no name; write NAME=FLAG:VALUE"),
        ("x=mesh:1x2", "setting 'x' says 'mesh:1x2'; write FLAG:VALUE with a flag of model, dtype"),
        ("x=dtype", "setting 'x' says 'dtype'; write FLAG:VALUE"),
        ("x=dtype:", "setting 'x' says 'dtype:'; write FLAG:VALUE"),
        ("x=seed:one", "setting 'x' sets seed to 'one'; give a whole number"),
        ("x=dtype:float8", "setting 'x' needs --dtype float8, which this version does not know"),
        (
            "x=quantization:int3",
            f"it knows {', '.join(QUANTIZATIONS)}",
        ),
        ("x=page-tokens:7", "it knows 8, 16, 32, 64, 128"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_can(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(text)
    assert message in str(caught.value)


def test_short_names_of_dtypes_are_taken() -> None:
    (setting,) = parse_settings("x=kv-dtype:bf16")
    assert setting.flags["kv_dtype"] == "bfloat16"
