"""What ``vllm.grpc.engine`` tells of model, server and load, out of the front end's own facts."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.engine.stats import EngineStats, ShardStats
from jaxserve.errors import InvalidRequestError
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.frontend.tokenizer import Tokenizer

SERVER_TYPE = "vllm-grpc"
"""The protocol's name for itself, by which gateways choose how to talk."""


def model_info(info: ModelInfo, tokenizer: Tokenizer) -> pb.GetModelInfoResponse:
    """Writes the facts of the model. Ids that it does not have are 0, as the protocol has it."""
    pad = tokenizer.special_texts.get("pad_token")
    return pb.GetModelInfoResponse(
        model_path=info.name,
        is_generation=True,
        max_context_length=info.context_tokens,
        vocab_size=info.vocab_size,
        served_model_name=info.name,
        model_type=info.architecture,
        architectures=[info.architecture],
        eos_token_ids=info.eos_token_ids,
        pad_token_id=(tokenizer.fast.token_to_id(pad) if pad else None) or 0,
        bos_token_id=tokenizer.bos_id or 0,
        max_req_input_len=info.context_tokens - 1,
    )


def server_info(
    info: ModelInfo, stats: EngineStats, *, started_s: float, last_request_s: float
) -> pb.GetServerInfoResponse:
    """Writes the facts of the server.

    Args:
        info: of the model.
        stats: of the engine.
        started_s: on the ``time.monotonic`` clock.
        last_request_s: Unix time of the last request; 0 before the first.
    """
    return pb.GetServerInfoResponse(
        active_requests=stats.rows_running + stats.requests_waiting,
        is_paused=stats.draining,
        last_receive_timestamp=last_request_s,
        uptime_seconds=time.monotonic() - started_s,
        server_type=SERVER_TYPE,
        data_parallel_size=max(1, len(stats.data_shards)),
        kv_cache_dtype=info.kv_dtype,
        block_size=info.page_tokens,
        model_dtype=info.dtype,
        max_num_seqs=info.max_rows,
        constrained_decoding_start="first_token",
    )


def loads(request: pb.GetLoadsRequest, info: ModelInfo, stats: EngineStats) -> pb.GetLoadsResponse:
    """Writes the load of every data shard, or of the one that is asked for.

    The queue and the rate of new tokens belong to all shards together and stand with the first, so
    that sums over the shards are right.

    Raises:
        InvalidRequestError: there is no such shard.
    """
    shards = stats.data_shards
    chosen = range(len(shards))
    if request.HasField("dp_rank"):
        if request.dp_rank not in chosen:
            raise InvalidRequestError(
                f"dp_rank is {request.dp_rank} and this server has {len(shards)}, counted from 0",
                field="dp_rank",
            )
        chosen = (request.dp_rank,)
    return pb.GetLoadsResponse(
        timestamp=datetime.now(UTC).isoformat(),
        version=info.server_version,
        dp_rank_count=len(shards),
        loads=[_load(rank, shards[rank], info, stats) for rank in chosen],
    )


def _load(rank: int, shard: ShardStats, info: ModelInfo, stats: EngineStats) -> pb.SchedulerLoad:
    waiting = stats.requests_waiting if rank == 0 else 0
    return pb.SchedulerLoad(
        dp_rank=rank,
        num_running_reqs=shard.rows_running,
        num_waiting_reqs=waiting,
        num_total_reqs=shard.rows_running + waiting,
        num_used_tokens=shard.pages_used * info.page_tokens,
        max_total_num_tokens=shard.pages_total * info.page_tokens,
        token_usage=shard.pages_used / max(1, shard.pages_total),
        gen_throughput=stats.output_tokens_per_second if rank == 0 else 0.0,
        cache_hit_rate=shard.prefix_hit_tokens / max(1, shard.prefix_lookup_tokens),
        utilization=shard.rows_running / max(1, shard.rows_max),
        max_running_requests=shard.rows_max,
        num_waiting_uncached_tokens=stats.tokens_waiting if rank == 0 else 0,
    )
