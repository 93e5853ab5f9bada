"""Whom the workers run as.

Only the workers give up rights (docs/decisions/0011): the supervisor keeps what it was started with, because
a reload reads key files again and a replacement worker needs the same steps as the first one.
"""

import grp
import os
import pwd
import resource
from dataclasses import dataclass
from typing import Final

from expressgateway.config.schema import Runtime
from expressgateway.control.failures import StartError


@dataclass(frozen=True, slots=True)
class Identity:
    """The user and group of the workers, as numbers; None: those of the supervisor."""

    user: int | None = None
    group: int | None = None


UNCHANGED_IDENTITY: Final = Identity()


def worker_identity(runtime: Runtime) -> Identity:
    """What `runtime.user` and `runtime.group` ask for. Raises `StartError` if it cannot be had."""
    if runtime.user is None and runtime.group is None:
        return Identity()
    user = group = None
    try:
        if runtime.user is not None:
            entry = pwd.getpwnam(runtime.user)
            user, group = entry.pw_uid, entry.pw_gid
        if runtime.group is not None:
            group = grp.getgrnam(runtime.group).gr_gid
    except KeyError as error:  # checked when the file was loaded; accounts can go since
        raise StartError(f"runtime.user or runtime.group is unknown on this machine: {error}") from None
    if os.geteuid() != 0:
        if user in (None, os.geteuid()) and group in (None, os.getegid()):
            return Identity()
        keys = " and ".join(key for key in ("user", "group") if getattr(runtime, key) is not None)
        raise StartError(
            f"runtime.{keys} needs root to take effect, and this process runs as user {os.geteuid()}: "
            "start as root, or remove the setting"
        )
    return Identity(user, group)


def raise_file_limit() -> int:
    """Let this process and its workers open as many files as they are allowed to; the number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            return soft
    return hard
