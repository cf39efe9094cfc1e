"""The facts about the served model that front ends tell clients; fixed at launch."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.errors import ModelNotFoundError


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One served model. The proto message ``Model`` has the same fields."""

    name: str
    """The name that requests use."""
    model_digest: str
    """SHA-256 (hex) of weights, config and tokenizer."""
    architecture: str = ""
    """Its family, such as ``llama``."""
    context_tokens: int = 0
    """Tokens that prompt and answer may have together."""
    vocab_size: int = 0
    dtype: str = ""
    """Of activations and unquantized weights, such as ``bfloat16``."""
    kv_dtype: str = ""
    """Of cached keys and values."""
    quantization: str = ""
    """Number formats of quantized weights, such as ``int4+int8``; empty when none are."""
    parameters: int = 0
    """Weights, in parameters."""
    mesh: str = ""
    """By axis name, such as ``data=2,tensor=4``."""
    sharding_summary: str = ""
    """One line on the layout over the mesh; empty on one device."""
    max_rows: int = 0
    """Requests computed together at most."""
    pages_total: int = 0
    """Pages that can be allocated; the null page is not counted."""
    page_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    has_chat_template: bool = False
    has_prompt_logprobs: bool = True
    has_embeddings: bool = False
    platform: str = ""
    """What computes, such as ``cpu`` or ``gpu``."""
    server_version: str = ""

    def __post_init__(self) -> None:
        """Refuses a model without a name."""
        if not self.name:
            raise ValueError("ModelInfo.name is empty; give the name that requests will use")

    @property
    def precision(self) -> str:
        """Number format of the weights, and of the cache where it has another."""
        weights = self.quantization or self.dtype
        return weights if self.kv_dtype in ("", weights) else f"{weights}, {self.kv_dtype} cache"

    def check_name(self, name: str) -> None:
        """Accepts this model's name and the empty one.

        Raises:
            ModelNotFoundError: any other name.
        """
        if name and name != self.name:
            raise ModelNotFoundError(name, self.name)
