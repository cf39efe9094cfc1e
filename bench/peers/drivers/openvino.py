"""OpenVINO GenAI's continuous batching, in this process."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bench.peers.drivers.stepped import Stepped, as_ids
from bench.peers.protocol import Question


class OpenVino(Stepped):
    """With a prefix cache and prompts cut into chunks, as the others have it."""

    def __init__(self, model: str, max_rows: int, step_tokens: int, kv_gb: int) -> None:
        super().__init__()
        genai = importlib.import_module("openvino_genai")
        self._genai, self._tensor = genai, importlib.import_module("openvino").Tensor
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = kv_gb
        scheduler.enable_prefix_caching = True
        scheduler.dynamic_split_fuse = True
        scheduler.max_num_seqs = max_rows
        scheduler.max_num_batched_tokens = step_tokens
        self._pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", {})
        self._handles: dict[str, Any] = {}
        self.version = genai.get_version().partition("-")[0]

    def submit(self, key: str, question: Question) -> None:
        """As ``Stepped.submit``."""
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = question.output_tokens, True
        config.do_sample = False
        ids = self._tensor(np.array([question.prompt], dtype=np.int64))
        self._handles[key] = self._pipeline.add_request(int(key), ids, config)

    def step(self) -> Iterator[tuple[str, Sequence[int], bool]]:
        """As ``Stepped.step``."""
        self._pipeline.step()
        running = self._genai.GenerationStatus.RUNNING
        for key, handle in list(self._handles.items()):
            is_finished = handle.get_status() != running
            ids: list[int] = []
            while handle.can_read():
                for output in handle.read().values():
                    ids += as_ids(output.generated_ids)
            if is_finished:
                del self._handles[key]
            if ids or is_finished:
                yield key, ids, is_finished


make = OpenVino
