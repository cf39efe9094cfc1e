"""SmolLM2 and Gemma 3, from their GGUF files, against what transformers recorded in float32.

Attention is dense and there is no cache: this is the model alone. The served path is compared with
it elsewhere.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.decoder import Model, Params
from jaxserve.models.registry import model_config
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.load import load_params
from tests.golden.signs import projection_signs
from tests.weights.reexport import Family, reexport
