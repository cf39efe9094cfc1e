"""KV events: written from batches made by hand, and followed over a socket and a real engine."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.engine import page_news
from jaxserve.engine.engine import Engine
from jaxserve.engine.page_news import PageBatch
from jaxserve.engine.prefix import ClearedPages, DroppedPage, StoredPage
from jaxserve.frontend.byte_tokenizer import byte_tokenizer
from jaxserve.frontend.generation import TextEngine
from jaxserve.frontend.grpc import kv_events
from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.kv_events import KvEventWriter, block_hash
from jaxserve.frontend.grpc.server import ServerThread
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.testing import counting_engine
from tests.frontend.grpc.asking import fail


def page(name: int, parent: int | None = None, salt: str = "shared/") -> StoredPage:
    before = None if parent is None else bytes([parent] * 16)
    return StoredPage(bytes([name] * 16), before, array("i", [name, name]), salt)


def dropped(name: int) -> DroppedPage:
    return DroppedPage(bytes([name] * 16))


def writer(start: int = 0, shards: int = 1) -> KvEventWriter:
    return KvEventWriter(start, page_tokens=2, shards=shards)


def hashed(name: int) -> int:
    return block_hash(bytes([name] * 16))


# -- writing ---------------------------------------------------------------------------------------


def test_a_chain_is_one_event_and_order_is_kept():
    changes = [
        page(1), page(2, 1), page(4, 1, "shared/s"), dropped(2), dropped(1), page(3, 4),
        ClearedPages(),
    ]  # fmt: skip
    (batch,) = writer().write(PageBatch(0, changes))
    chain, salted, gone, late, cleared = batch.events

    assert [event.event_id for event in batch.events] == [1, 2, 3, 4, 5]
    assert [block.block_hash for block in chain.stored.blocks] == [hashed(1), hashed(2)]
    assert not chain.stored.HasField("parent_block_hash")
    assert not chain.stored.HasField("cache_salt")
    assert [list(block.token_ids) for block in chain.stored.blocks] == [[1, 1], [2, 2]]
    assert chain.stored.blocks[0].block_size == 2
    assert (salted.stored.parent_block_hash, salted.stored.cache_salt) == (hashed(1), "s")
    assert list(gone.removed.block_hashes) == [hashed(2), hashed(1)]
    assert late.stored.parent_block_hash == hashed(4)
    assert cleared.WhichOneof("data") == "cleared"
    assert not batch.HasField("dp_rank")
    assert not batch.HasField("snapshot")


def test_a_snapshot_is_cut_into_numbered_chunks(monkeypatch):
    monkeypatch.setattr(kv_events, "CHUNK_TOKENS", 4)
    pages = [page(1), page(2, 1), page(3, 2), page(4), page(5)]
    written = writer(start=7, shards=2)
    chunks = list(written.write(PageBatch(1, pages, snapshot=True)))
    (live,) = written.write(PageBatch(0, [dropped(1)]))

    assert [chunk.sequence_number for chunk in chunks] == [8, 9, 10]
    assert [(c.snapshot.index, c.snapshot.count, c.snapshot.blocks) for c in chunks] == [
        (0, 3, 5),
        (1, 3, 5),
        (2, 3, 5),
    ]
    assert {chunk.dp_rank for chunk in chunks} == {1}
    kinds = [[event.WhichOneof("data") for event in chunk.events] for chunk in chunks]
    assert kinds == [["cleared", "stored", "stored"], ["stored", "stored"], ["stored"]]
    assert {event.event_id for chunk in chunks for event in chunk.events} == {0}
    assert (live.sequence_number, live.dp_rank, live.events[0].event_id) == (11, 0, 1)


def test_an_empty_snapshot_still_clears():
    (chunk,) = writer().write(PageBatch(0, [], snapshot=True))

    assert [event.WhichOneof("data") for event in chunk.events] == ["cleared"]
    assert (chunk.sequence_number, chunk.snapshot.count) == (1, 1)


def test_what_was_lost_is_a_number_left_out():
    written = writer()
    numbers = [b.sequence_number for b in written.write(PageBatch(0, [dropped(1)]))]
    written.skip()
    numbers += [b.sequence_number for b in written.write(PageBatch(0, [], snapshot=True))]

    assert numbers == [1, 3]


def test_hashes_are_64_bits_with_a_sign():
    assert block_hash(b"\xff" * 16) == -1
    assert block_hash(b"\x7f" + b"\xff" * 15) == 2**63 - 1


# -- over the engine -------------------------------------------------------------------------------


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[Any, ServerThread]]]:
    """Serves an engine; returns a stub and the server."""
    engines: list[Engine] = []
    servers: list[ServerThread] = []
    channels: list[grpc.Channel] = []

    def serve(host: str = "127.0.0.1", **sizes: Any) -> tuple[Any, ServerThread]:
        engine, _ = counting_engine(**sizes)
        engine.start()
        engines.append(engine)
        info = ModelInfo(name="m", model_digest="d", page_tokens=4)
        text = TextEngine(engine, byte_tokenizer(), None)
        servers.append(ServerThread(text, info, ServerConfig(host=host, port=0)))
        address = servers[-1].start().replace("0.0.0.0", "127.0.0.1")
        channels.append(grpc.insecure_channel(address))
        return vllm_engine_pb2_grpc.VllmEngineStub(channels[-1]), servers[-1]

    yield serve
    for channel in channels:
        channel.close()
    for server in servers:
        server.stop(grace_s=0.0)
    for engine in engines:
        engine.stop()
        engine.check_integrity()


def generate(stub: Any, prompt: list[int]) -> None:
    tokens = pb.TokenizedInput(input_ids=prompt)
    asked = pb.SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    list(stub.Generate(pb.GenerateRequest(tokenized=tokens, sampling_params=asked)))


class Index:
    """A subscriber, as the protocol describes one."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.number: int | None = None
        self.tokens: dict[int, list[int]] = {}
        self.gaps = 0

    def read(self) -> common_pb2.KvEventBatch:
        batch = next(self.call)
        if self.number is not None and batch.sequence_number != self.number + 1:
            self.gaps += 1
            assert batch.HasField("snapshot")
        self.number = batch.sequence_number
        for event in batch.events:
            match event.WhichOneof("data"):
                case "cleared":
                    self.tokens.clear()
                case "removed":
                    for name in event.removed.block_hashes:
                        del self.tokens[name]
                case "stored":
                    parent = event.stored.parent_block_hash
                    known = self.tokens[parent] if parent else []
                    for block in event.stored.blocks:
                        known = self.tokens[block.block_hash] = [*known, *block.token_ids]
        return batch

    def read_until(self, prefix: list[int]) -> None:
        while prefix not in self.tokens.values():
            self.read()


def test_a_subscriber_learns_what_is_cached_and_can_come_back(serve):
    stub, _ = serve()
    generate(stub, list(range(9)))
    index = Index(stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest()))
    first = index.read()
    assert first.snapshot.blocks == 2
    assert sorted(index.tokens.values()) == [[0, 1, 2, 3], list(range(8))]
    generate(stub, [*range(8), 9, 9, 9, 9, 9])
    index.read_until([*range(8), 9, 9, 9, 9])
    index.call.cancel()

    back = common_pb2.SubscribeKvEventsRequest(start_sequence_number=index.number)
    again = Index(stub.SubscribeKvEvents(back))
    again.number = index.number
    again.read()
    assert (again.tokens, again.gaps) == (index.tokens, 0)


def test_a_slow_subscriber_gets_a_gap_and_a_fresh_snapshot(serve, monkeypatch):
    """With room for no batch at all every change loses the feed, until one snapshot has fitted."""
    stub, _ = serve()
    index = Index(stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest()))
    index.read()
    monkeypatch.setattr(page_news, "FEED_BATCHES", 0)
    generate(stub, [1] * 5)
    monkeypatch.setattr(page_news, "FEED_BATCHES", 1024)
    index.read_until([1] * 4)

    assert index.gaps == 1


def test_a_subscription_ends_with_the_server_and_delays_no_stop(serve):
    stub, server = serve()
    call = stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest())
    next(call)
    server.stop(grace_s=60.0)

    assert fail(call).code() is grpc.StatusCode.UNAVAILABLE


def test_strangers_are_not_told_what_others_ask(serve):
    stub, _ = serve(host="0.0.0.0")
    error = fail(stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest()))

    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "would tell strangers the tokens of every prompt" in error.details()
