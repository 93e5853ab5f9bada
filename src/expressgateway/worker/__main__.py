"""``python -m expressgateway.worker``: started by the supervisor, never by hand."""

import gc
import sys
from importlib import import_module

if __name__ == "__main__":
    # Modules make no cycles that are ever free; looking for some is a fifth of the time that a start takes.
    gc.disable()
    process = import_module("expressgateway.worker.process")
    gc.enable()
    sys.exit(process.main())
