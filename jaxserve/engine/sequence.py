"""What the engine knows about a live request: its choices and how far each has come.

    made ──> waiting ──plan──> running(prompt) ──plan──> running(decode) ──publish──> done
                ^                    │                          │
                └────────────── preempted: pages given back, computed again later

A ``LiveSequence`` is one choice. Its counters move at two moments, and the difference is the step
in flight: ``computed`` and ``sampled`` when a step is planned, ``tokens`` and ``committed`` when
its result is published.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.engine.constraint import Matcher
from jaxserve.engine.request import Request, TokenLogprobs
from jaxserve.engine.stream import TokenStream


@dataclass(eq=False, slots=True)
class LiveRequest:
    """One accepted request until its last choice has ended."""

    number: int
    """Counts up with every submitted request."""
    request: Request
    stream: TokenStream
    seed: int
    accepted_s: float
    salt: str
    """The cache salt; a private one when prefixes are not shared between requests."""
    stop_ids: frozenset[int]
    """Every token that ends an answer."""
    open_choices: int
    sequences: list[LiveSequence] = field(default_factory=list["LiveSequence"])
    """One per choice. Those after the first wait for its prompt to be in the pool."""
    choices_queued: bool = False
    """Whether the choices after the first have been queued."""
    scheduled_s: float | None = None
    first_token_s: float | None = None
    answered: bool = True
    """False once a choice has ended with neither ``stop`` nor ``length``."""
    started: bool = False
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""

    def make_choices(self, order: float, context_tokens: int) -> None:
        """Makes the sequences, none of them queued.

        Args:
            order: see ``LiveSequence.rank``.
            context_tokens: prompt and output together at most.
        """
        request = self.request
        sampling = request.sampling
        prompt_tokens = len(request.prompt)
        room = context_tokens - prompt_tokens
        constraint = request.constraint
        max_tokens = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        self.sequences = [
            LiveSequence(
                live=self,
                choice=choice,
                rank=(order, self.number, choice),
                tokens=[*request.prompt, *request.resume],
                prompt_tokens=prompt_tokens,
                max_total=prompt_tokens + max_tokens,
                matcher=constraint.matcher(request.resume) if constraint is not None else None,
            )
            for choice in range(sampling.n)
        ]
        if sampling.prompt_logprobs is not None:
            self.sequences[0].prompt_logprobs = [None]


@dataclass(eq=False, slots=True)
class LiveSequence:
    """One choice: its tokens, the pages that hold their keys and values, and its row."""

    live: LiveRequest
    choice: int
    rank: tuple[float, int, int]
    """(order, request number, choice): smaller is served first and preempted last. Unique."""
    tokens: list[int]
    """Prompt, then every output token that is known to the host."""
    prompt_tokens: int
    """Length of the prompt alone; resumed tokens count as output."""
    max_total: int
    """Prompt and output tokens at most."""
    pages: list[int] = field(default_factory=list[int])
    shard: int = 0
    """The data shard whose pages and row these are; decided anew at every admission."""
    row: int = -1
    """Place in the device's per-row state while running, counted through all shards; else -1."""
    queued: bool = False
    computed: int = 0
    """Tokens whose keys and values are in the pool once the planned steps have run."""
    committed: int = 0
    """The same, for published steps: these positions are known to be good."""
    sampled: int = 0
    """Output tokens planned so far: known ones and the one in flight."""
    target: int = 0
    """Tokens known at admission: the prompt phase ends when ``computed`` reaches it."""
    digests: list[bytes] = field(default_factory=list[bytes])
    """Prefix digests of the full pages of ``tokens``, as far as they were needed yet."""
    indexed: int = 0
    """Leading pages that the prefix cache has seen."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Scores of the prompt so far, until they are sent. While there are any, the sequence takes
    nothing from the prefix cache, because every position has to be computed."""
    matcher: Matcher | None = None
    """Stands behind ``tokens`` in the grammar that the answer obeys, if there is one."""
    done: bool = False
    first_token_s: float | None = None
    last_token_s: float | None = None
    """When the newest token was published."""

    @property
    def output_tokens(self) -> int:
        """Output tokens known to the host."""
        return len(self.tokens) - self.prompt_tokens
