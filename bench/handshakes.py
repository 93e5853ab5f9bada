"""A client that makes a new TLS connection, with a full handshake, for every request.

wrk resumes its sessions and h2load keeps its connections, so neither can show what a first visit costs. Run
as `python -m bench.handshakes PORT THREADS SECONDS`; writes one JSON object: seconds, bytes, latencies_us,
errors. The certificate is not checked: this counts the server's work.
"""

import json
import socket
import ssl
import sys
import threading
import time

REQUEST = b"GET /small HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
MAX_ERRORS = 10
"""A thread gives up after so many failures; the run has failed by then."""


def client_context() -> ssl.SSLContext:
    """TLS 1.3 only, any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def one_request(context: ssl.SSLContext, port: int) -> int:
    """Connects, asks, reads to the end; the bytes read. Raises OSError, or ValueError if not a 200."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(plain, server_hostname="localhost") as secure:
            secure.sendall(REQUEST)
            answer = bytearray()
            while chunk := secure.recv(65536):
                answer += chunk
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise ValueError(f"answered {bytes(answer[:40])!r}")
    return len(answer)


def main(port: int, threads: int, seconds: float) -> None:
    """Runs that many threads, each one request after the other."""
    context = client_context()
    latencies_us: list[float] = []
    errors: list[str] = []
    received: list[int] = []
    began = time.perf_counter()
    ends = began + seconds

    def visit_again_and_again() -> None:
        failures = 0
        while (start := time.perf_counter()) < ends and failures < MAX_ERRORS:
            try:
                received.append(one_request(context, port))
                latencies_us.append((time.perf_counter() - start) * 1e6)
            except (OSError, ValueError) as error:
                failures += 1
                errors.append(f"{type(error).__name__}: {error}")

    workers = [threading.Thread(target=visit_again_and_again) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    elapsed = time.perf_counter() - began
    result = {"seconds": elapsed, "bytes": sum(received), "latencies_us": latencies_us, "errors": errors}
    print(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
