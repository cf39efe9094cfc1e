"""Perplexity and KL as the engine measures them, against numpy over recorded and dense logits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.config import ServeConfig
from jaxserve.convert import open_model
from jaxserve.errors import ConfigError, RequestFailedError
from jaxserve.evaluation import measure as module
from jaxserve.evaluation.measure import evaluate, measure, prepare
from jaxserve.evaluation.result import Against, Outcome
from jaxserve.evaluation.settings import Setting, parse_settings
from jaxserve.evaluation.texts import Windows
from jaxserve.frontend.byte_tokenizer import byte_tokenizer
from jaxserve.runner.compiling import CompileCounter
from jaxserve.runner.dense import DenseForward

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = GOLDEN / "tiny"
WINDOW = 40
"""The same nearly everywhere, so that programs are compiled once."""
TEXT = "The sky is blue, and the sea is what it sees. " * 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A recorded checkpoint, with a tokenizer, which the recorded ones lack."""
    folder = tmp_path_factory.mktemp("tiny")

    def copy(name: str) -> Path:
        if not (folder / name).exists():
            shutil.copytree(TINY / name, folder / name)
            byte_tokenizer().fast.save(str(folder / name / "tokenizer.json"))
        return folder / name

    return copy


def config(model: str | Path, cache_dir: Path, **options: Any) -> ServeConfig:
    shared = {"device": "cpu", "dtype": "float32", "step_tokens": 16, "offline": True}
    places = {"assets_dir": cache_dir, "cache_dir": cache_dir}
    return ServeConfig(model=str(model), **places, **{**shared, **options})


def windows_of(prompts: Sequence[Sequence[int]] | np.ndarray) -> Windows:
    return Windows([list(map(int, prompt)) for prompt in prompts], 0, 0, 0)


def run(
    asked: ServeConfig, settings: str, prompts: Sequence[Sequence[int]] | np.ndarray
) -> list[Outcome]:
    windows = windows_of(prompts)
    parsed = parse_settings(settings)
    return measure([prepare(asked, each, len(prompts[0])) for each in parsed], windows)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def against_of(outcome: Outcome) -> Against:
    assert outcome.against is not None
    return outcome.against


@pytest.mark.parametrize("count", [40, 33], ids=["whole", "last-token-in-a-step-of-its-own"])
def test_kl_and_perplexity_are_those_of_full_logits(
    count: int, cache_dir: Path, tiny: Callable[[str], Path]
) -> None:
    """The base's logits are what transformers gave; the other's are one dense pass."""
    recorded = np.load(TINY / "llama" / "reference.npz")
    prompt = recorded["prompt_1"][:count].tolist()
    with open_model(config(tiny("qwen2"), cache_dir)) as opened:
        other = log_softmax(DenseForward(opened.model)(opened.load(), prompt))[:-1]
    base = log_softmax(recorded["logits_1"])[: count - 1]
    targets = prompt[1:]

    outcomes = run(
        config(tiny("llama"), cache_dir), f"unquantized,other=model:{tiny('qwen2')}", [prompt]
    )

    for outcome, expected in zip(outcomes, (base, other), strict=True):
        nats = -expected[np.arange(count - 1), targets].mean()
        assert outcome.nats_per_token == pytest.approx(nats, rel=1e-4)
        assert outcome.perplexity == pytest.approx(np.exp(nats), rel=1e-4)
    kl = (np.exp(base) * (base - other)).sum(axis=-1)
    assert kl.min() > 0.1
    assert outcomes[0].against is None
    found = against_of(outcomes[1])
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert found.same_top == np.mean(base.argmax(-1) == other.argmax(-1))
    assert (found.kl_error, found.more_nats_error) == (None, None)


def test_a_setting_beside_itself_has_no_divergence_at_all(cache_dir: Path) -> None:
    prompts = np.random.default_rng(0).integers(0, 256, (3, WINDOW))
    _, same, cache = run(
        config("dummy:tiny-llama", cache_dir), "unquantized,same=seed:0,kv-int8", prompts
    )
    found = against_of(same)
    assert (found.kl_mean, found.kl_max, found.kl_error) == (0.0, 0.0, 0.0)
    assert (found.more_nats, found.perplexity_ratio, found.same_top) == (0.0, 1.0, 1.0)
    rounded = against_of(cache)
    assert 1e-6 < rounded.kl_mean < 1e-2
    assert rounded.kl_error is not None
    assert 0 < rounded.kl_error < rounded.kl_mean < rounded.kl_p99 <= rounded.kl_max


def test_bytes_and_capacity_are_those_of_each_setting(cache_dir: Path) -> None:
    """427,264 bytes are 106,816 weights; a token has 2 x 2 layers x 2 heads of 16 numbers."""
    prompts = np.random.default_rng(0).integers(0, 256, (1, WINDOW))
    plain, cache, half = run(
        config("dummy:tiny-llama", cache_dir), "unquantized,kv-int8,bf16", prompts
    )
    assert (plain.weight_bytes, half.weight_bytes) == (427_264, 213_632)
    assert plain.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert cache.kv_bytes_per_token == 2 * 2 * 2 * (16 + 2)
    assert cache.kv_tokens_per_gib == 2**30 // 144
    assert (cache.weights, cache.kv_dtype) == ("float32", "int8")
    assert (half.weights, half.kv_dtype) == ("bfloat16", "bfloat16")


def test_errors_are_those_of_means_over_windows() -> None:
    found = Against.of(
        np.array([0.1, 0.3]),
        np.array([[0.0, 0.2], [0.2, 0.4]], np.float32),
        np.array([[True, True], [True, False]]),
    )
    assert found.more_nats == pytest.approx(0.2)
    assert found.more_nats_error == pytest.approx(0.1)
    assert found.perplexity_ratio == pytest.approx(np.exp(0.2))
    assert found.perplexity_ratio_error == pytest.approx(0.1 * np.exp(0.2))
    assert (found.kl_mean, found.kl_error) == (pytest.approx(0.2), pytest.approx(0.1))
    assert found.same_top == 0.75


@pytest.mark.parametrize(
    "mesh", ["1x3", *(pytest.param(mesh, marks=pytest.mark.wide) for mesh in ("1x2", "2x1"))]
)
def test_a_mesh_measures_what_one_device_does(mesh: str, cache_dir: Path) -> None:
    """1x3 pads the vocabulary, whose padding must not count."""
    prompts = np.random.default_rng(0).integers(0, 256, (2, WINDOW))
    settings = "unquantized,other=seed:1"
    alone = run(config("dummy:tiny-llama", cache_dir), settings, prompts)[1]
    split = run(config("dummy:tiny-llama", cache_dir, mesh=mesh), settings, prompts)[1]
    assert split.perplexity == pytest.approx(alone.perplexity, rel=1e-5)
    assert against_of(split).kl_mean == pytest.approx(against_of(alone).kl_mean, rel=1e-5)
    assert against_of(split).kl_max == pytest.approx(against_of(alone).kl_max, rel=1e-5)
    assert against_of(split).same_top == against_of(alone).same_top


def test_perplexity_is_what_transformers_recorded(
    assets: Callable[[str], Path], cache_dir: Path
) -> None:
    recorded = np.load(GOLDEN / "perplexity_smollm2.npz")
    tokens, nll = recorded["gpl3_tokens"][:1], recorded["gpl3_nll"][:1]
    asked = config(assets("smollm2"), cache_dir, step_tokens=64)
    (found,) = run(asked, "float32", tokens)
    assert found.nats_per_token == pytest.approx(nll.sum() / tokens[:, 1:].size, rel=1e-5)


def test_nothing_is_compiled_between_windows(cache_dir: Path) -> None:
    counter, seen = CompileCounter.instance(), dict[str, list[int]]()

    def report(stage: str, done: int, total: int, detail: str) -> None:
        if detail == "windows":
            seen.setdefault(stage, []).append(counter.compiles)

    settings = parse_settings("unquantized,kv-int8")
    evaluate(
        config("dummy:tiny-llama", cache_dir), settings, {"t": TEXT}, window=WINDOW, report=report
    )
    assert seen.keys() == {"unquantized", "kv-int8"}
    for counts in seen.values():
        assert len(counts) == len(TEXT) // WINDOW
        assert len(set(counts)) == 1


def test_an_evaluation_says_what_was_scored(cache_dir: Path) -> None:
    """The window follows from the model's context of 512 when none is given."""
    found = evaluate(
        config("dummy:tiny-llama", cache_dir), parse_settings("unquantized"), {"t": TEXT}
    )
    assert (found.windows, found.window_tokens) == (1, 511)
    assert found.scored_tokens == 510
    assert found.left_out_tokens == len(TEXT) - 511
    assert found.text_bytes == len(TEXT)
    assert found.outcomes[0].nats_per_token == pytest.approx(np.log(found.outcomes[0].perplexity))


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 1, 512, 4096])
def test_a_window_has_to_fit_the_context(window: int, cache_dir: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluate(
            config("dummy:tiny-llama", cache_dir),
            parse_settings("unquantized"),
            {"t": TEXT},
            window=window,
        )
    assert str(caught.value) == (
        f"--window is {window:,} and the model's context of 512 tokens has room for 2 to 511"
    )


def test_a_setting_that_the_model_refuses_is_named_before_anything_is_launched(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "build", lambda *_: pytest.fail("something was launched"))
    with pytest.raises(ConfigError, match=r"'int8' is refused: .*w_o.* NAME=FLAG:VALUE"):
        evaluate(
            config("dummy:tiny-llama", cache_dir),
            parse_settings("unquantized,int8"),
            {"t": TEXT},
            window=WINDOW,
        )


def test_a_setting_that_does_not_fit_is_named(cache_dir: Path) -> None:
    asked = config("dummy:tiny-llama", cache_dir, kv_memory_bytes=1024)
    with pytest.raises(ConfigError, match=r"setting 'bf16' cannot be launched: .*--kv-memory"):
        run(asked, "bf16", [[1] * WINDOW])


def test_models_of_other_tokens_are_not_compared(
    cache_dir: Path, tiny: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError, match="vocabulary of 320 and the first setting's of 512"):
        run(
            config("dummy:tiny-llama", cache_dir),
            f"unquantized,other=model:{tiny('llama')}",
            [[1] * WINDOW],
        )


def test_models_that_read_the_text_otherwise_are_not_compared(
    cache_dir: Path, assets: Callable[[str], Path]
) -> None:
    settings = parse_settings(f"unquantized,other=model:{assets('smollm2')}")
    with pytest.raises(ConfigError, match=r"setting 'other' is refused: .* reads the texts as"):
        evaluate(config("dummy:tiny-llama", cache_dir), settings, {"t": TEXT}, window=WINDOW)


def test_what_is_kept_of_the_first_setting_has_a_bound(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_KEPT_BYTES", 2 * 39 * 64 * 4 - 1)
    prompts = np.zeros((2, WINDOW), int)
    asked = config("dummy:tiny-llama", cache_dir)
    with pytest.raises(ConfigError, match=r"78 places have .* give less text, or --max-windows"):
        run(asked, "unquantized,kv-int8", prompts)
    assert len(run(asked, "unquantized", prompts)) == 1


def test_weights_that_are_no_numbers_are_not_measured(
    cache_dir: Path, tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "damaged")
    path = tmp_path / "damaged" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.nan)
    path.unlink()
    save_file(weights, path)
    with pytest.raises(RequestFailedError, match="'plain, window 1' failed: the log-probability"):
        measure(
            [prepare(config(path.parent, cache_dir), Setting("plain", {}), WINDOW)],
            windows_of([[1] * WINDOW]),
        )
