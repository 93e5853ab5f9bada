"""Runs the real supervisor with fake workers: ``python fake_supervisor.py CONFIG [TIMING=SECONDS ...]``."""

import os
import sys
from pathlib import Path

from expressgateway.control.supervisor import Options, run
from expressgateway.control.worker_process import WORKER_COMMAND
from expressgateway.control.workers import Fleet, Timing


async def broken(self: Fleet) -> None:
    raise RuntimeError("a defect made for the test")


if __name__ == "__main__":
    if "FAKE_DEFECT" in os.environ:
        Fleet.collect = broken  # type: ignore[method-assign]  # what the background work trips over
    config, *settings = sys.argv[1:]
    timing = Timing(**{name: float(value) for name, value in (one.split("=") for one in settings)})
    python = os.environ.get("FAKE_WORKER_PYTHON", sys.executable)
    worker: tuple[str, ...] = (python, "-P", str(Path(__file__).with_name("fake_worker.py")))
    if "REAL_WORKERS" in os.environ:
        worker = WORKER_COMMAND
    sys.exit(run(Path(config), Options(worker_command=worker, timing=timing)))
