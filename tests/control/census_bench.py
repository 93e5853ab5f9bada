"""What counting a connection in and out costs: ``python -m tests.control.census_bench``."""

import sys
import timeit

from expressgateway.control.census import Census, CensusTable

RUNS = 50_000


def main() -> None:
    for workers in (1, 2, 8, 32):
        table = CensusTable(workers)
        everyone = [Census(table.fd, index, workers) for index in range(workers)]
        for number in range(2000):
            for one in everyone:
                one.enter(f"10.0.{number >> 8}.{number & 255}")
        here = everyone[0]
        for name, ip in (("known", "10.0.1.7"), ("new", "10.9.1.7"), ("IPv6", "2001:db8::1")):

            def once(ip: str = ip, here: Census = here) -> None:
                here.enter(ip)
                here.leave(ip)

            seconds = min(timeit.repeat(once, number=RUNS, repeat=5)) / RUNS
            sys.stdout.write(f"{workers:3} workers, {name:5} address: {seconds * 1e6:.2f} us\n")


if __name__ == "__main__":
    main()
