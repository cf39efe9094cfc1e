"""Every error that jaxserve raises on purpose.

    JaxserveError
    ├── InvalidRequestError            the client must change the request; never retried
    │   ├── PromptTooLongError
    │   └── DuplicateRequestError
    ├── ModelNotFoundError             the request names a model that is not served here
    ├── RequestNotFoundError           abort of a request that is not live
    ├── NotOfferedError                a call of a protocol that this server does not answer
    ├── RetryableError                 the same request may succeed later or elsewhere
    │   ├── QueueFullError
    │   ├── DrainingError
    │   └── ShuttingDownError
    ├── DeadlineExceededError          the client's deadline passed
    ├── RequestCancelledError          somebody asked for the request to stop
    ├── SlowReaderError                the client stopped reading its stream
    ├── RequestFailedError             this request failed inside the engine; others go on
    ├── EngineDeadError                the engine thread has ended; the server exits
    ├── GroupError                     a host of the mesh did not come or was lost; all exit
    └── LaunchError                    the operator must change a flag, a file or the machine
        ├── AssetError                 (in ``assets.py``: a pinned file is missing or damaged)
        ├── ConfigError
        ├── MeshError
        ├── CheckpointError
        │   └── UnsupportedModelError
        ├── TokenizerError
        ├── ExecutablesError
        └── MemoryPlanError

Every class carries its facts as attributes; messages are for people and say the value, the limit
and the remedy. ``frontend/grpc/status.py`` maps classes to status codes.
"""

from __future__ import annotations


class JaxserveError(Exception):
    """Base of every error raised on purpose."""

    reason: str = "INTERNAL"
    """Stable upper-case word that clients may switch on (``google.rpc.ErrorInfo.reason``)."""


class InvalidRequestError(JaxserveError):
    """A request that no server of this model could serve as it stands."""

    reason = "INVALID_REQUEST"

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class PromptTooLongError(InvalidRequestError):
    """The prompt leaves no room for even one new token."""

    reason = "PROMPT_TOO_LONG"

    def __init__(self, prompt_tokens: int, context_tokens: int) -> None:
        super().__init__(
            f"prompt has {prompt_tokens} tokens and the context window is {context_tokens}; "
            f"send at most {context_tokens - 1}, or set truncate_prompt_tokens",
            field="prompt",
        )
        self.prompt_tokens = prompt_tokens
        self.context_tokens = context_tokens


class DuplicateRequestError(InvalidRequestError):
    """A request id that belongs to a live request was sent again."""

    reason = "DUPLICATE_REQUEST_ID"

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"request_id {request_id!r} is in use by a live request; "
            "send another id, or leave it empty and the server chooses one",
            field="request_id",
        )
        self.request_id = request_id


class ModelNotFoundError(JaxserveError):
    """The request names a model that this server does not serve."""

    reason = "MODEL_NOT_FOUND"

    def __init__(self, model: str, served: str) -> None:
        super().__init__(
            f"model {model!r} is not served here; this server serves {served!r} "
            "(leave model empty to use it)"
        )
        self.model = model
        self.served = served


class RequestNotFoundError(JaxserveError):
    """No live request has this id."""

    reason = "REQUEST_NOT_FOUND"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"no live request has the id {request_id!r}; it may have finished already")
        self.request_id = request_id


class NotOfferedError(JaxserveError):
    """A call that belongs to a protocol which is spoken here, and that is not answered."""

    reason = "NOT_OFFERED"

    def __init__(self, call: str, why: str) -> None:
        super().__init__(f"{call} is not offered here: {why}")
        self.call = call


class RetryableError(JaxserveError):
    """The same request may succeed after ``retry_after_s`` seconds, here or elsewhere."""

    reason = "RETRY"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(RetryableError):
    """The waiting queue has reached one of its two bounds."""

    reason = "QUEUE_FULL"

    def __init__(self, what: str, value: int, limit: int, *, retry_after_s: float) -> None:
        super().__init__(
            f"the queue is full ({value} {what}, limit {limit}); "
            f"retry in about {retry_after_s:.1f} s, or raise --max-waiting-{what}",
            retry_after_s=retry_after_s,
        )
        self.what = what
        self.value = value
        self.limit = limit


class DrainingError(RetryableError):
    """The server is shutting down and takes no new requests."""

    reason = "DRAINING"

    def __init__(self, *, retry_after_s: float = 1.0) -> None:
        super().__init__(
            "the server is draining and takes no new requests; retry on another server",
            retry_after_s=retry_after_s,
        )


class ShuttingDownError(RetryableError):
    """The server ended before the request did; another one can continue the answer."""

    reason = "SHUTTING_DOWN"

    def __init__(self, request_id: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(
            f"the server shut down before request {request_id!r} was finished; resume it on "
            "another server with the tokens received so far",
            retry_after_s=retry_after_s,
        )
        self.request_id = request_id


class DeadlineExceededError(JaxserveError):
    """The client's deadline passed before the request was finished."""

    reason = "DEADLINE_EXCEEDED"

    def __init__(self, request_id: str, output_tokens: int) -> None:
        super().__init__(
            f"the deadline of request {request_id!r} passed after {output_tokens} output tokens; "
            "send a longer deadline or a smaller max_tokens"
        )
        self.request_id = request_id
        self.output_tokens = output_tokens


class RequestCancelledError(JaxserveError):
    """The request was aborted or its client went away."""

    reason = "CANCELLED"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request {request_id!r} was cancelled")
        self.request_id = request_id


class SlowReaderError(JaxserveError):
    """The client accepted nothing for longer than the stall limit."""

    reason = "SLOW_READER"

    def __init__(self, request_id: str, stall_s: float) -> None:
        super().__init__(
            f"the client of request {request_id!r} read nothing for {stall_s:g} s; "
            "read the stream as it arrives, or raise --stall-timeout-s"
        )
        self.request_id = request_id
        self.stall_s = stall_s


class RequestFailedError(JaxserveError):
    """This request failed inside the engine; the others are not affected."""

    reason = "REQUEST_POISONED"

    def __init__(self, request_id: str, cause: str) -> None:
        super().__init__(f"request {request_id!r} failed: {cause}")
        self.request_id = request_id


class EngineDeadError(JaxserveError):
    """The engine thread has ended; nothing can be served by this process any more."""

    reason = "ENGINE_DEAD"

    def __init__(self, cause: str) -> None:
        super().__init__(f"the engine has stopped ({cause}); the server is shutting down")


class GroupError(JaxserveError):
    """A host of the mesh did not come, cannot be reached, or was lost; the message names it."""

    reason = "HOST_LOST"


class LaunchError(JaxserveError):
    """Something that the operator must change before a server can start."""

    reason = "LAUNCH"


class ConfigError(LaunchError):
    """One or more flags have values that cannot be used; all are listed."""


class MeshError(LaunchError):
    """The mesh does not fit the devices or the model."""


class CheckpointError(LaunchError):
    """A checkpoint is missing, truncated, corrupt or incomplete."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint's architecture, or an option of it, is not implemented."""


class TokenizerError(LaunchError):
    """A tokenizer or chat template is missing or cannot be read."""


class ExecutablesError(LaunchError):
    """Programs that were compiled ahead are not there, are damaged or are for something else."""


class MemoryPlanError(LaunchError):
    """The device memory cannot hold the weights, the temporaries and a useful page pool."""
