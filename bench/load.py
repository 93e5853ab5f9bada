"""The load generators and what they say: wrk, h2load, and `bench.handshakes` for full TLS handshakes.

Each call runs one generator for one run and returns a `Load`; anything but clean 2xx answers raises
`LoadError`, because a number that counts errors as work is worse than none. wrk speaks TLS 1.2 and resumes
sessions, so nothing here uses it for TLS. Knows addresses, not proxies.
"""

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.stats import percentile

GRACE_S = 30.0
"""How much longer than its run a generator may take before it is killed."""

DONE_LUA = """
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\nRESULT {"requests":%d,"microseconds":%d,"bytes":%d,"p50":%f,"p99":%f,' ..
    '"errors":{"connect":%d,"read":%d,"write":%d,"status":%d,"timeout":%d}}\\n',
    summary.requests, summary.duration, summary.bytes, latency:percentile(50), latency:percentile(99),
    e.connect, e.read, e.write, e.status, e.timeout))
end
"""

# A thousand different browser-like requests, built once, sent in turn: a proxy that caches what it parsed
# from the last request must not profit from it here.
VARYING_LUA = """
local pool, at = {}, 0
init = function(args)
  math.randomseed(7)
  for i = 1, 1000 do
    local session = string.format("%08x%08x%08x", math.random(2^31), math.random(2^31), i)
    pool[i] = wrk.format("GET", string.format("/catalogue/%d/item-%d?page=%d&sort=price", i % 40, i, i % 7), {
      ["User-Agent"] = "Mozilla/5.0 (X11; Linux x86_64; rv:128." .. (i % 30) .. ") Gecko/20100101 Firefox",
      ["Accept"] = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
      ["Accept-Language"] = "en-GB,en;q=0.5",
      ["Accept-Encoding"] = "gzip, deflate, br, zstd",
      ["Referer"] = "http://shop.example/catalogue/" .. (i % 40),
      ["Cookie"] = "session=" .. session .. "; theme=dark; basket=" .. (i * 37 % 1000),
      ["DNT"] = "1",
      ["Upgrade-Insecure-Requests"] = "1",
      ["Sec-Fetch-Dest"] = "document",
      ["Sec-Fetch-Mode"] = "navigate",
      ["Sec-Fetch-Site"] = "same-origin",
    })
  end
end
request = function()
  at = at % 1000 + 1
  return pool[at]
end
"""

CLOSE_LUA = 'wrk.headers["Connection"] = "close"\n'


def upload_lua(size: int) -> str:
    """POSTs `size` bytes each time."""
    return f'wrk.method = "POST"\nwrk.body = string.rep("0123456789", {size // 10})\n'


class LoadError(Exception):
    """The generator did not run, or not every answer was a success; the message says what it reported."""


@dataclass(frozen=True)
class Load:
    """What one run of a generator achieved."""

    requests: int
    seconds: float
    bytes: int
    """Read from the proxy, heads included; 0 where the generator does not say."""
    p50_us: float | None
    p99_us: float | None
    """None where the generator does not say."""


def run_generator(command: list[str], seconds: float, watch: Callable[[], None] | None = None) -> str:
    """Its output; `watch` is called twice a second while it runs.

    Raises LoadError when it cannot be run, fails, or hangs. It never outlives the call.
    """
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise LoadError(f"{command[0]} cannot be run: {error}") from error
    deadline = time.monotonic() + seconds + GRACE_S
    try:
        while True:
            try:
                output, complaint = process.communicate(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    raise LoadError(f"{command[0]} did not end within {seconds + GRACE_S:.0f} s") from None
                if watch is not None:
                    watch()
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    if process.returncode != 0:
        said = (complaint or output).strip().splitlines() or ["no output"]
        raise LoadError(f"{command[0]} exited with {process.returncode}: {said[-1]}")
    return output


def parse_wrk(output: str) -> Load:
    """Reads the line that DONE_LUA wrote."""
    found = re.search(r"^RESULT (\{.*\})$", output, re.MULTILINE)
    if found is None:
        raise LoadError(f"wrk wrote no result: {output.strip()[-200:]!r}")
    said = json.loads(found[1])
    errors = ", ".join(f"{count} {kind} errors" for kind, count in said["errors"].items() if count)
    if errors:
        raise LoadError(f"wrk saw {errors} beside {said['requests']} requests")
    if not said["requests"]:
        raise LoadError("wrk completed no request")
    return Load(said["requests"], said["microseconds"] / 1e6, said["bytes"], said["p50"], said["p99"])


def wrk(url: str, *, connections: int, seconds: int, script: str, scratch: Path) -> Load:
    """One thread of wrk; `script` is Lua that shapes the requests."""
    lua = scratch / "wrk.lua"
    lua.write_text(script + DONE_LUA, encoding="ascii")
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(lua), url]
    return parse_wrk(run_generator(command, seconds))


_FINISHED = re.compile(r"^finished in ([\d.]+)(us|ms|s|m|h)", re.MULTILINE)
_COUNTS = re.compile(
    r"^requests: \d+ total, \d+ started, (\d+) done, (\d+) succeeded, "
    r"(\d+) failed, (\d+) errored, (\d+) timeout",
    re.MULTILINE,
)
_STATUSES = re.compile(r"^status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx", re.MULTILINE)
_TRAFFIC = re.compile(r"^traffic: .*?\((\d+)\) total", re.MULTILINE)
_ALPN = re.compile(r"^Application protocol: (\S+)", re.MULTILINE)
_UNIT_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_h2load(output: str, log: str) -> Load:
    """Reads h2load's summary, and percentiles from its --log-file (start, status, microseconds), if any."""
    finished, counts = _FINISHED.search(output), _COUNTS.search(output)
    statuses, traffic = _STATUSES.search(output), _TRAFFIC.search(output)
    if finished is None or counts is None or statuses is None:
        raise LoadError(f"h2load wrote no summary: {output.strip()[-200:]!r}")
    done, succeeded, *failures = map(int, counts.groups())
    succeeded_heads, *other_heads = map(int, statuses.groups())
    # The end of a timed run may fall between the head of an HTTP/2 response and its body.
    if any(failures) or succeeded != done or any(other_heads) or succeeded_heads < done:
        raise LoadError(f"h2load saw failures: {counts[0]}; {statuses[0]}")
    if not done:
        raise LoadError("h2load completed no request")
    latencies = sorted(float(line.split("\t")[2]) for line in log.splitlines())
    return Load(
        requests=done,
        seconds=float(finished[1]) * _UNIT_S[finished[2]],
        bytes=int(traffic[1]) if traffic else 0,
        p50_us=percentile(latencies, 50) if latencies else None,
        p99_us=percentile(latencies, 99) if latencies else None,
    )


def _version(streams: int) -> list[str]:
    return [f"-m{streams}"] if streams else ["--h1"]


def check_version(output: str, streams: int) -> None:
    """Raises LoadError when another version was spoken over TLS than was asked for."""
    spoken = _ALPN.search(output)
    wanted = "h2" if streams else "http/1.1"
    if spoken is not None and spoken[1] != wanted:
        raise LoadError(f"the proxy spoke {spoken[1]} instead of {wanted}")
    if spoken is None and streams:
        raise LoadError("the proxy did not agree to speak h2 (ALPN)")


def h2load(url: str, *, connections: int, seconds: int, scratch: Path, streams: int = 0) -> Load:
    """TLS 1.3 when the URL says https. HTTP/1.1 with one request at a time on each connection, or over TLS
    HTTP/2 with that many ``streams``."""
    log = scratch / "h2load.log"
    command = [
        "h2load",
        *_version(streams),
        f"-c{connections}",
        f"-D{seconds}",
        f"--log-file={log}",
        url,
    ]
    log.unlink(missing_ok=True)  # h2load appends
    output = run_generator(command, seconds)
    check_version(output, streams)
    return parse_h2load(output, log.read_text("ascii"))


def h2load_bulk(
    url: str, *, requests: int, streams: int, at_most_s: float, body: Path | None, size: int
) -> Load:
    """That many bodies of ``size`` bytes one after another on one connection over TLS, down, or up from the
    file ``body``. The bytes are those of the bodies."""
    upload = [f"-d{body}"] if body is not None else []
    command = ["h2load", *_version(streams), "-c1", f"-n{requests}", *upload, url]
    output = run_generator(command, at_most_s)
    check_version(output, streams)
    load = parse_h2load(output, "")
    if load.requests != requests or (body is None and load.bytes < requests * size):
        raise LoadError(f"h2load completed {load.requests} of {requests} requests in {load.bytes} bytes")
    return dataclasses.replace(load, bytes=requests * size)


def h2load_count(
    url: str, *, connections: int, requests: int, at_most_s: float, watch: Callable[[], None]
) -> Load:
    """That many requests over HTTP/1.1, however long they take, without percentiles."""
    command = ["h2load", "--h1", f"-c{connections}", f"-n{requests}", url]
    load = parse_h2load(run_generator(command, at_most_s, watch), "")
    if load.requests != requests:
        raise LoadError(f"h2load completed {load.requests} of {requests} requests")
    return load


def parse_h3(output: str) -> Load:
    """Reads the JSON object of `bench.h3_load`."""
    try:
        said = json.loads(output)
    except ValueError as error:
        raise LoadError(f"the HTTP/3 client wrote no result: {output.strip()[-200:]!r}") from error
    if said["errors"]:
        raise LoadError(f"the HTTP/3 client saw {said['errors']} errors beside {said['requests']} requests")
    if not said["requests"]:
        raise LoadError("the HTTP/3 client completed no request")
    return Load(
        said["requests"], said["seconds"], said["bytes"], said["p50_ms"] * 1000, said["p99_ms"] * 1000
    )


def h3(port: int, path: str, *, connections: int, streams: int, seconds: float, upload: int = 0) -> Load:
    """HTTP/3 requests in closed loops, with bodies of ``upload`` bytes."""
    command = [sys.executable, "-m", "bench.h3_load", "127.0.0.1", str(port), path]
    command += ["--connections", str(connections), "--streams", str(streams), "--seconds", str(seconds)]
    command += ["--upload", str(upload)]
    return parse_h3(run_generator(command, seconds))


def parse_handshakes(output: str) -> Load:
    """Reads the JSON object of `bench.handshakes`."""
    try:
        said = json.loads(output)
    except ValueError as error:
        raise LoadError(f"the TLS client wrote no result: {output.strip()[-200:]!r}") from error
    if said["errors"]:
        raise LoadError(f"{len(said['errors'])} handshakes or requests failed, first: {said['errors'][0]}")
    latencies = sorted(said["latencies_us"])
    if not latencies:
        raise LoadError("the TLS client completed no request")
    return Load(
        len(latencies), said["seconds"], said["bytes"], percentile(latencies, 50), percentile(latencies, 99)
    )


def handshakes(port: int, *, connections: int, seconds: int) -> Load:
    """A new TLS 1.3 connection, full handshake, for each request."""
    command = [sys.executable, "-m", "bench.handshakes", str(port), str(connections), str(seconds)]
    return parse_handshakes(run_generator(command, seconds))
