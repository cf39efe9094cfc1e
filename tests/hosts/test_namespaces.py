"""Two hosts with network stacks of their own, and a client with a third.

    client's namespace     10.213.0.254  bridge ─┬─ veth ─ 10.213.0.1  host 0's namespace
                                                 └─ veth ─ 10.213.0.2  host 1's namespace

Nothing but these links connects them, so an address that is taken for another's, a port that is
not open or a cable that is pulled shows as it would between machines. Needs root and iproute2.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from jaxserve.engine.request import Request, SamplingParams
from tests.agreement.ways import ask_together, make_service
from tests.hosts.group_process import LONG, MODEL, PROVE, SIZES, HostGroup, prove

pytestmark = pytest.mark.slow

ADDRESSES = ("10.213.0.1", "10.213.0.2")
CLIENT_ADDRESS = "10.213.0.254"
LIMIT_S = 10.0
"""From a cut to everybody's knowing of it; --host-timeout-s is 6."""
REFUSED_S = 120.0
COMMAND_S = 120.0
"""For a command that computes little, on a machine that is busy."""
INSTALL_S = 180.0
SECRET = {"JAXSERVE_GROUP_SECRET": "only these two know it"}
PROMPT = "The sky is"


class Network:
    """The three namespaces, by name."""

    def __init__(self, prefix: str) -> None:
        self.hosts = (f"{prefix}-0", f"{prefix}-1")
        self.client = f"{prefix}-c"

    def prefix(self, namespace: str) -> list[str]:
        """Of a command that is to run in a namespace."""
        return ["ip", "netns", "exec", namespace]

    def group(self, directory: Path, cache_dir: Path, **options: object) -> HostGroup:
        """A host in each namespace, for clients anywhere."""
        settings: dict[str, object] = {
            "prefix_of": {number: self.prefix(name) for number, name in enumerate(self.hosts)},
            "environment": {0: SECRET, 1: SECRET},
            "address": ADDRESSES[0],
            "flags": ["--host", "0.0.0.0", "--insecure"],
        }
        return HostGroup(directory, cache_dir, **(settings | options))  # pyright: ignore[reportArgumentType]

    def ask(self, *command: str) -> subprocess.Popen[str]:
        """Starts a Python command in the client's namespace."""
        return subprocess.Popen(
            [*self.prefix(self.client), sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )


def ip(*arguments: str) -> None:
    """Runs iproute2's `ip`.

    Raises:
        OSError: it says no.
    """
    result = subprocess.run(
        ["ip", *arguments], capture_output=True, text=True, check=False, timeout=COMMAND_S
    )
    if result.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")


def skip(reason: str) -> None:
    print(f"\nno network namespaces: {reason}")
    pytest.skip(f"no network namespaces: {reason}")


def have_ip() -> None:
    """Installs iproute2 where that is possible, or skips."""
    if shutil.which("ip") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        command = ["apt-get", "install", "-y", "--no-install-recommends", "iproute2"]
        subprocess.run(command, capture_output=True, check=False, timeout=INSTALL_S)
    if shutil.which("ip") is None:
        skip("`ip` is missing; install iproute2")


def connect(network: Network, undo: ExitStack) -> None:
    """Makes everything; removing a namespace removes the links in it."""
    for name in (*network.hosts, network.client):
        ip("netns", "add", name)
        undo.callback(ip, "netns", "del", name)
        ip("-n", name, "link", "set", "lo", "up")
    inside = ("-n", network.client)
    ip(*inside, "link", "add", "bridge", "type", "bridge")
    ip(*inside, "addr", "add", f"{CLIENT_ADDRESS}/24", "dev", "bridge")
    ip(*inside, "link", "set", "bridge", "up")
    for number, name in enumerate(network.hosts):
        port = f"host{number}"
        ip("-n", name, "link", "add", "wire", "type", "veth", "peer", port, "netns", network.client)
        ip(*inside, "link", "set", port, "master", "bridge", "up")
        ip("-n", name, "addr", "add", f"{ADDRESSES[number]}/24", "dev", "wire")
        ip("-n", name, "link", "set", "wire", "up")


@pytest.fixture
def network() -> Iterator[Network]:
    have_ip()
    made = Network(f"jaxserve-{os.getpid()}")
    with ExitStack() as undo:
        try:
            connect(made, undo)
        except OSError as error:
            skip(str(error))
        yield made


def one_device_answers(cache_dir: Path, max_tokens: int) -> list[int]:
    with make_service(MODEL, cache_dir, cache_dir, **SIZES) as service:
        prompt = service.text.tokenizer.encode(PROMPT, add_special_tokens=True)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        (tokens,) = ask_together(
            service.engine, [Request(request_id="one", prompt=prompt, sampling=sampling)]
        )
    return tokens


@pytest.mark.parametrize(
    "mesh",
    [
        # Every all-reduce uses the link, and stands still when it is cut.
        "1x4",
        # The device runtime does not notice: only steps use the link.
        pytest.param("2x4", marks=PROVE),
        pytest.param("1x8", marks=PROVE),
    ],
)
def test_hosts_on_a_network_answer_until_its_link_is_cut_and_then_all_end(
    mesh: str,
    network: Network,
    tmp_path: Path,
    cache_dir: Path,
    record_property: Callable[[str, object], None],
) -> None:
    expected = one_device_answers(cache_dir, 16)
    with network.group(tmp_path, cache_dir, mesh=mesh) as group:
        group.wait_ready()
        flags = ["--max-tokens", "16", "--temperature", "0", "--json"]
        command = ["-m", "jaxserve", "generate", PROMPT, "--server", group.address, *flags]
        with network.ask(*command) as client:
            out, _ = client.communicate(timeout=COMMAND_S)
        assert client.returncode == 0, group
        assert json.loads(out)["token_ids"] == expected

        script = str(Path(__file__).with_name("read_stream.py"))
        tokens = str(LONG.get("max_tokens"))
        with network.ask(script, group.address, tokens) as client:
            assert client.stdout is not None
            assert "began" in client.stdout.readline(), group
            start = time.monotonic()
            ip("-n", network.hosts[1], "link", "set", "wire", "down")
            out, _ = client.communicate(timeout=COMMAND_S)
        ended = json.loads(out)
        statuses = group.wait_exit(LIMIT_S)
        exits_s = [host.ended_at - start for host in group.hosts.values()]
        line = (
            f"cut-link {mesh}   stream ended {ended['ended'] - start:.1f} s {ended['code']}, "
            f"host 0 exit {statuses[0]} {exits_s[0]:.1f} s, "
            f"host 1 exit {statuses[1]} {exits_s[1]:.1f} s"
        )
        print(f"\n{line}\n  {ended['details']}")
        print(f"  {[host.failure for host in group.hosts.values()]}")
        record_property("fault", line)
        assert ended["code"] == "UNAVAILABLE", ended
        assert re.search(r"host 1 \(.+\) was lost: ", ended["details"]), ended
        assert max(ended["ended"] - start, *exits_s) < LIMIT_S, line
        assert 0 not in statuses.values(), group
        for host_id, lost in ((0, 1), (1, 0)):
            failure = group.hosts[host_id].failure
            assert re.search(rf"host {lost} \(.+\) was lost: ", failure), group
        group.wait_nothing_left()


@prove
def test_a_port_that_is_closed_between_hosts_is_found_before_anything_is_compiled(
    network: Network, tmp_path: Path, cache_dir: Path
) -> None:
    """A routing rule of host 0 stands for a firewall: it reaches host 1 only as an answer."""
    group = network.group(tmp_path, cache_dir)
    rule = ("-n", network.hosts[0], "rule", "add", "ipproto", "tcp")
    ip(*rule, "pref", "10", "sport", group.coordinator.rpartition(":")[2], "lookup", "main")
    ip(*rule, "pref", "20", "dport", "1024-65534", "prohibit")
    with group:
        assert group.wait_exit(REFUSED_S) == {0: 1, 1: 1}, group
        for host in group.hosts.values():
            assert "host 0 cannot reach host 1 at " in host.failure, group
            assert "open the network between them to all ports" in host.failure
            assert "[compile]" not in host.errors


@prove
def test_a_host_that_looks_for_host_0_on_its_own_loopback_is_told_so(
    network: Network, tmp_path: Path, cache_dir: Path
) -> None:
    flags = ["--join-timeout-s", "1"]
    options = {"hosts": [1], "address": "127.0.0.1", "flags": flags}
    with network.group(tmp_path, cache_dir, **options) as group:
        assert group.wait_exit(REFUSED_S) == {1: 1}, group
        failure = group.hosts[1].failure
        assert f"host 0 cannot be reached at {group.coordinator}" in failure
        assert f"{group.coordinator} is loopback and reaches this machine only" in failure
