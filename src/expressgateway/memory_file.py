"""Content as a file, for libraries that only read paths: OpenSSL's loaders of certificates and keys."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def as_file(content: bytes) -> Iterator[str]:
    """A path that a library can open and nobody else can: the file is in memory and goes when we are done."""
    descriptor = os.memfd_create("expressgateway-material")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
