"""Whether the parts of an engine fit together; asked once, before the first request finds out."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.engine.admission import EngineLimits
from jaxserve.engine.plan import SchedulerConfig
from jaxserve.engine.step import MAX_END_TOKENS, StepShape


def check_fit(
    scheduler: SchedulerConfig, shape: StepShape, limits: EngineLimits, end_ids: Sequence[int]
) -> None:
    """Checks that whatever the scheduler may plan has a compiled shape, and room in the pool.

    Raises:
        ValueError: with the two numbers that disagree.
    """
    if len(end_ids) > MAX_END_TOKENS:
        raise ValueError(f"end_ids has {len(end_ids)} entries and the limit is {MAX_END_TOKENS}")
    if shape.max_rows != scheduler.max_rows:
        raise ValueError(f"{scheduler.max_rows} rows are scheduled and {shape.max_rows} compiled")
    if shape.data_shards != scheduler.data_shards:
        raise ValueError(
            f"{scheduler.data_shards} data shards are scheduled and {shape.data_shards} compiled"
        )
    wanted = {"prefill": shape.prefill_buckets}
    if limits.prompt_logprobs:
        wanted["score"] = shape.score_buckets
    if limits.embeddings:
        wanted["embed"] = shape.embed_buckets
    for kind, buckets in wanted.items():
        longest = max((tokens for _, tokens in buckets), default=0)
        if longest < scheduler.longest_chunk:
            raise ValueError(
                f"a prompt chunk may have {scheduler.longest_chunk} tokens and the longest {kind} "
                f"bucket has {longest}; lower chunk_tokens or add a bucket"
            )
    if max(shape.decode_buckets, default=0) < shape.max_rows:
        raise ValueError(f"no decode bucket has max_rows = {shape.max_rows} rows; add one")
    room = min(shape.table_width, scheduler.num_pages - 1) * scheduler.page_tokens
    if limits.context_tokens > room:
        raise ValueError(
            f"context_tokens is {limits.context_tokens}, and a page table of {shape.table_width} "
            f"pages of {scheduler.page_tokens} tokens from a pool of {scheduler.num_pages - 1} "
            f"holds {room}; lower context_tokens or raise num_pages and table_width"
        )
