"""Runs the real supervisor with fake workers: ``python fake_supervisor.py CONFIG [TIMING=SECONDS ...]``."""

import sys
from pathlib import Path

from expressgateway.control.supervisor import Options, run
from expressgateway.control.workers import Timing

if __name__ == "__main__":
    config, *settings = sys.argv[1:]
    timing = Timing(**{name: float(value) for name, value in (one.split("=") for one in settings)})
    worker = (sys.executable, "-P", str(Path(__file__).with_name("fake_worker.py")))
    sys.exit(run(Path(config), Options(worker_command=worker, timing=timing)))
