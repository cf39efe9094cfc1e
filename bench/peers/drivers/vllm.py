"""vLLM on a CPU, in this process, through its engine's ``add_request`` and ``step``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence

from bench.peers.drivers.stepped import Stepped, as_ids
from bench.peers.protocol import Question


class Vllm(Stepped):
    """Compiled, as it serves by default. Its thread settings are the system's environment."""

    def __init__(self, model: str, dtype: str, max_rows: int, context_tokens: int) -> None:
        super().__init__()
        vllm = importlib.import_module("vllm")
        sampling = importlib.import_module("vllm.sampling_params")
        self._parameters, self._delta = sampling.SamplingParams, sampling.RequestOutputKind.DELTA
        self._engine = vllm.LLMEngine.from_engine_args(
            vllm.EngineArgs(
                model=model,
                dtype=dtype,
                max_model_len=context_tokens,
                max_num_seqs=max_rows,
                disable_log_stats=True,
            )
        )
        self.version = vllm.__version__

    def submit(self, key: str, question: Question) -> None:
        """As ``Stepped.submit``."""
        parameters = self._parameters(
            temperature=0,
            max_tokens=question.output_tokens,
            ignore_eos=True,
            output_kind=self._delta,
        )
        self._engine.add_request(key, {"prompt_token_ids": question.prompt}, parameters)

    def step(self) -> Iterator[tuple[str, Sequence[int], bool]]:
        """As ``Stepped.step``."""
        for output in self._engine.step():
            yield output.request_id, as_ids(output.outputs[0].token_ids), output.finished


make = Vllm
