"""What may be asked for over Open Inference Protocol v2: names, types, and where they may stand.

The protocol leaves names to models. These are those of Triton's vLLM and TensorRT-LLM backends and
of our own proto. Each may be an input tensor, a request parameter, or a key of the JSON object in
``sampling_parameters``, whose values may be text, as that backend's own clients write them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.grammar import GRAMMAR_OPTIONS

ALIASES = {
    "random_seed": "seed",
    "stop_words": "stop",
    "min_length": "min_tokens",
    "num_return_sequences": "n",
    "include_stop_str_in_output": "include_stop",
}
HARMLESS = frozenset({"priority", "triton_enable_empty_final_response"})
"""Of Triton's own request parameters. The last response always has text, so it is never empty."""


def _one(name: str, value: Any) -> Any:
    if isinstance(value, list):
        if len(value) != 1:
            raise _wrong(name, value, "one value")
        return value[0]
    return value


def _text(name: str, value: Any) -> str:
    value = _one(name, value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise _wrong(name, value, "text in UTF-8") from None
    if not isinstance(value, str):
        raise _wrong(name, value, "a text")
    return value


def _plain(name: str, value: Any) -> Any:
    """Returns a scalar; one that is written as text is read as JSON."""
    value = _one(name, value)
    if not isinstance(value, bytes | str):
        return value
    try:
        return json.loads(_text(name, value).strip().lower())
    except (ValueError, RecursionError):
        return value


def _whole(name: str, value: Any) -> int:
    number = _plain(name, value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if type(number) is not int:
        raise _wrong(name, value, "a whole number")
    return number


def _number(name: str, value: Any) -> float:
    number = _plain(name, value)
    if type(number) not in (int, float):
        raise _wrong(name, value, "a number")
    try:
        return float(number)
    except OverflowError:
        raise _wrong(name, value, "a number") from None


def _flag(name: str, value: Any) -> bool:
    flag = _plain(name, value)
    if flag not in (True, False):
        raise _wrong(name, value, "true or false")
    return bool(flag)


def _top_k(name: str, value: Any) -> int:
    number = _whole(name, value)
    return 0 if number == -1 else number  # vLLM's word for all of them.


def _list(value: Any) -> list[Any]:
    if isinstance(value, bytes | str):
        try:
            read = json.loads(value)
        except (ValueError, RecursionError):
            return [value]
        return read if isinstance(read, list) else [value]
    return value if isinstance(value, list) else [value]


def _texts(name: str, value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list) else _list(value)
    return tuple(_text(name, item) for item in items)


def _whole_list(name: str, value: Any) -> tuple[int, ...]:
    items = _list(_one(name, value)) if _is_text_list(value) else _list(value)
    return tuple(_whole(name, item) for item in items)


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 1 and isinstance(value[0], bytes | str)


def _bias(name: str, value: Any) -> dict[int, float]:
    bias = _plain(name, value)
    if not isinstance(bias, Mapping):
        raise _wrong(name, value, "a JSON object of token ids and numbers")
    return {_whole(name, token): _number(name, number) for token, number in bias.items()}


def _object(name: str, value: Any) -> Any:
    """Leaves a grammar to ``take_grammar``, which knows what each may be."""
    value = _list(value) if name == "choices" else _one(name, value)
    if name == "json_object":
        return _flag(name, value)
    if isinstance(value, list):
        return [_text(name, item) for item in value]
    return _text(name, value) if isinstance(value, bytes) else value


READERS: dict[str, tuple[str, Callable[[str, Any], Any]]] = {
    "text_input": ("BYTES", _text),
    "sampling_parameters": ("BYTES", _text),
    "stream": ("BOOL", _flag),
    "exclude_input_in_output": ("BOOL", _flag),
    "return_finish_reason": ("BOOL", _flag),
    "return_cumulative_logprob": ("BOOL", _flag),
    "return_logprobs": ("BOOL", _flag),
    "return_num_input_tokens": ("BOOL", _flag),
    "return_num_output_tokens": ("BOOL", _flag),
    "max_tokens": ("INT32", _whole),
    "min_tokens": ("INT32", _whole),
    "temperature": ("FP32", _number),
    "top_p": ("FP32", _number),
    "top_k": ("INT32", _top_k),
    "min_p": ("FP32", _number),
    "seed": ("UINT64", _whole),
    "presence_penalty": ("FP32", _number),
    "frequency_penalty": ("FP32", _number),
    "repetition_penalty": ("FP32", _number),
    "n": ("INT32", _whole),
    "stop": ("BYTES", _texts),
    "stop_token_ids": ("INT32", _whole_list),
    "include_stop": ("BOOL", _flag),
    "ignore_eos": ("BOOL", _flag),
    "logit_bias": ("BYTES", _bias),
    "allowed_token_ids": ("INT32", _whole_list),
    "banned_token_ids": ("INT32", _whole_list),
    "logprobs": ("INT32", _whole),
    "skip_special_tokens": ("BOOL", _flag),
    "truncate_prompt_tokens": ("INT32", _whole),
    "beam_width": ("INT32", _whole),
    **dict.fromkeys(GRAMMAR_OPTIONS, ("BYTES", _object)),
}
"""Name -> the type that is told to clients (another that says the same is taken), the reader."""
LISTS = frozenset({"stop", "stop_token_ids", "allowed_token_ids", "banned_token_ids", "choices"})


def read_options(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns every option under our own name, those in ``sampling_parameters`` beside the others.

    Args:
        sources: where options come from, in words for errors, and what is there.

    Raises:
        InvalidRequestError: a name is not known or there twice, or its value is of another type.
    """
    options: dict[str, Any] = {}
    pending = [
        (source, said, value) for source, given in sources.items() for said, value in given.items()
    ]
    for source, said, value in pending:
        name = ALIASES.get(said, said)
        if name not in READERS:
            raise InvalidRequestError(
                f"{said!r} ({source}) is not known here; known are "
                f"{', '.join([*READERS, *ALIASES])}",
                field=said,
            )
        if value is None:
            continue  # JSON's null: not given.
        if name in options:
            raise InvalidRequestError(
                f"{said!r} ({source}) is given twice; send it once", field=said
            )
        options[name] = READERS[name][1](said, value)
        if name == "sampling_parameters":
            pending += [(f"in {name}", *item) for item in _read_json(options[name]).items()]
    options.pop("sampling_parameters", None)
    return options


def _read_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"sampling_parameters is not JSON ({str(error)[:80]}); send a JSON object",
            field="sampling_parameters",
        ) from None
    if not isinstance(value, dict):
        raise _wrong("sampling_parameters", text, "a JSON object")
    return value


def _wrong(name: str, value: Any, wanted: str) -> InvalidRequestError:
    shown = repr(value)[:80]
    return InvalidRequestError(f"{name} is {shown}; send {wanted}", field=name)
