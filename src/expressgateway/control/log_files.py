"""The supervisor's part in the access log: that the file is there and that the workers may append to it.

Workers open it themselves, by its path, and may have fewer rights than the supervisor; they never create it.
So it is made here, for them, and then opened once as they will: ownership, every directory above, ACLs and
read-only mounts are all asked by the only question that counts. What is in the file is not known here.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from expressgateway.control.failures import StartError
from expressgateway.control.privileges import UNCHANGED_IDENTITY, Identity
from expressgateway.observe.access_log import STDOUT, open_log

MODE: Final = 0o640

_KEY: Final = "observability.access_log.path"


def prepare(path: str, identity: Identity) -> None:
    """Create the file, with mode 0640 and owned by the workers, if it is absent; then see that they can
    append to it. What exists is left as it is. Call it before each start and each reopening: the file may
    have been moved away. Raises `StartError`.
    """
    if path == STDOUT:
        try:
            os.fstat(1)
        except OSError:
            raise StartError(f"{_KEY} is stdout, and standard output is closed: name a file") from None
        return
    is_new = _create(path, identity)
    try:
        with _acting_as(identity):
            os.close(open_log(path))
    except OSError as error:
        if is_new:
            os.unlink(path)
        raise StartError(_sentence(path, identity, error)) from None


def _create(path: str, identity: Identity) -> bool:
    """Whether it was absent and could be made."""
    try:
        # O_EXCL follows no link: whoever owns the directory cannot have us make, or give away, a file
        # elsewhere.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
    except FileExistsError:
        return False
    except OSError as error:
        raise StartError(
            f"the access log {path} cannot be created: {error.strerror}; create its directory, or choose "
            f"another {_KEY}"
        ) from None
    try:
        if identity != UNCHANGED_IDENTITY:
            os.fchown(fd, _or_same(identity.user), _or_same(identity.group))
        os.fchmod(fd, MODE)  # whatever the umask
    except OSError as error:
        os.unlink(path)
        raise StartError(
            f"the access log {path} cannot be given to the workers: {error.strerror}; create it for them, or "
            f"choose another {_KEY}"
        ) from None
    finally:
        os.close(fd)
    return True


def _or_same(number: int | None) -> int:
    return -1 if number is None else number


@contextmanager
def _acting_as(identity: Identity) -> Iterator[None]:
    """With the rights of a worker. For single system calls: the whole process has them meanwhile."""
    if identity == UNCHANGED_IDENTITY:
        yield
        return
    user, group, groups = os.geteuid(), os.getegid(), os.getgroups()
    try:
        os.setgroups([])
        if identity.group is not None:
            os.setegid(identity.group)
        if identity.user is not None:
            os.seteuid(identity.user)
        yield
    finally:
        os.seteuid(user)  # first: the other two need it
        os.setegid(group)
        os.setgroups(groups)


def _sentence(path: str, identity: Identity, error: OSError) -> str:
    who = f"user {identity.user}" if identity.user is not None else "the workers"
    if error.errno == errno.ENXIO:
        why = "nobody reads it; start its reader first"
    elif error.errno in (errno.EISDIR, errno.EINVAL):
        why = "it is not a file; name one"
    else:
        why = f"{error.strerror}; let {who} write the file and enter its directory"
    return f"the access log {path} cannot be appended to by {who}: {why}, or choose another {_KEY}"
