"""A client in a process of its own, for tests that run it in a network namespace.

`read_stream.py ADDRESS MAX_TOKENS` asks for one long answer and prints a JSON object as it begins
and another as it ends.
"""

from __future__ import annotations

import json
import sys
import time

import grpc

from jaxserve.frontend import client_wire as wire
from jaxserve.frontend.client_stubs import Stubs

LIMIT_S = 120.0


def main(address: str, max_tokens: int) -> None:
    request = wire.generate_request(
        None,
        [5, 6, 7],
        None,
        {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True},
    )
    tokens, code, details = 0, "OK", ""
    with grpc.insecure_channel(address) as channel:
        try:
            for response in Stubs(channel).generation.Generate(request, timeout=LIMIT_S):
                if tokens == 0 and response.delta.token_ids:
                    print(json.dumps({"began": time.monotonic()}), flush=True)
                tokens += len(response.delta.token_ids)
        except grpc.RpcError as error:
            code, details = error.code().name, error.details()  # pyright: ignore[reportAttributeAccessIssue]
    ended = {"ended": time.monotonic(), "tokens": tokens, "code": code, "details": details}
    print(json.dumps(ended), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
