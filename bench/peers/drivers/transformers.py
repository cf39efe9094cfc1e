"""Continuous batching of transformers, in this process; it has a thread of its own."""

from __future__ import annotations

import importlib
import queue
from collections.abc import Iterator, Sequence

from bench.peers.drivers.stepped import Stepped, as_ids
from bench.peers.protocol import Question

POLL_S = 1.0
NO_TOKEN = -1
"""An end token that is never sampled."""


class Transformers(Stepped):
    """Paged attention through PyTorch's scaled dot product."""

    def __init__(self, model: str, dtype: str, threads: int, step_tokens: int, blocks: int) -> None:
        super().__init__()
        torch = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
        utils = importlib.import_module("transformers.generation.configuration_utils")
        torch.set_num_threads(threads)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self._manager = loaded.init_continuous_batching(
            generation_config=transformers.GenerationConfig(
                do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=0, max_new_tokens=64
            ),
            continuous_batching_config=utils.ContinuousBatchingConfig(
                max_batch_tokens=step_tokens, num_blocks=blocks
            ),
        )
        self._manager.start()
        self._seen: dict[str, int] = {}
        self.version = f"{transformers.__version__} (torch {torch.__version__})"

    def submit(self, key: str, question: Question) -> None:
        """As ``Stepped.submit``."""
        self._seen[key] = 0
        self._manager.add_request(
            question.prompt,
            request_id=key,
            max_new_tokens=question.output_tokens,
            streaming=True,
            eos_token_id=NO_TOKEN,
        )

    def step(self) -> Iterator[tuple[str, Sequence[int], bool]]:
        """As ``Stepped.step``."""
        try:
            output = self._manager.get_result(timeout=POLL_S)
        except queue.Empty:
            return
        if output is None:
            if not self._manager.is_running():
                raise RuntimeError("the manager's thread has ended")
            return
        if output.error:
            raise RuntimeError(str(output.error))
        if output.request_id not in self._seen:
            return
        # Each output has all tokens so far.
        ids = as_ids(output.generated_tokens)[self._seen[output.request_id] :]
        self._seen[output.request_id] += len(ids)
        is_finished = output.is_finished()
        if is_finished:
            del self._seen[output.request_id]
        yield output.request_id, ids, is_finished

    def close(self) -> None:
        """Stops the thread."""
        self._manager.stop(block=True, timeout=10)


make = Transformers
