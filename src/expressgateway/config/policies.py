"""Balancing policies that somebody else wrote: whether a worker could make use of them.

Each is tried in an interpreter of its own, started like a worker: with the same search path and the same
account, so what passes here starts there; and whatever the code does when it is imported, it does not do it
to the supervisor. Knows nothing of what a policy is.
"""

import grp
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from typing import Final

from expressgateway.config.diagnose import Problem
from expressgateway.config.schema import Config, LoadBalancing, Runtime
from expressgateway.config.values import Loc

PATIENCE_S: Final = 10.0
"""For importing one policy."""

_MAX_TOLD: Final = 300  # characters of the sentence: some of it is the code's own

_SEARCH: Final = (
    "it is looked for where Python finds its packages and in PYTHONPATH, not in the current directory"
)

_MARK: Final = "\x1e"
"""Stands before the answer: the code may print, too."""

_TRY: Final = f"""
import sys
from expressgateway.upstream.selection import SelectionError, find_policy
told = ""
try:
    find_policy(sys.argv[1])
except SelectionError as error:
    told = str(error)
sys.stdout.write({_MARK!r} + told)
"""


def policy_problems(config: Config) -> Iterator[Problem]:
    """Policies named as `package.module:Class` that no worker could start with."""
    told: dict[str, str] = {}
    for loc, balancing in _balancings(config):
        if ":" not in (policy := balancing.policy):
            continue
        if policy not in told:
            told[policy] = _try(policy, config.runtime)
        if told[policy]:
            hint = _SEARCH if "ModuleNotFoundError" in told[policy] else ""
            yield Problem((*loc, "policy"), told[policy], hint)


def _balancings(config: Config) -> Iterator[tuple[Loc, LoadBalancing]]:
    for index, listener in enumerate(config.listeners):
        yield ("listeners", index, "load_balancing"), listener.load_balancing
    for index, pool in enumerate(config.pools):
        yield ("pools", index, "load_balancing"), pool.load_balancing


def _try(policy: str, runtime: Runtime) -> str:
    """What is wrong with it, as a sentence; empty if nothing is."""
    user, group = _account(runtime)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _TRY, policy],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE_S,
            check=False,
            user=user,
            group=group,
            extra_groups=None if user is None and group is None else [],
        )
    except subprocess.TimeoutExpired:
        return f"the balancing policy '{policy}' is not imported within {PATIENCE_S:g} seconds"
    except OSError as error:
        return f"the balancing policy '{policy}' cannot be tried: {error.strerror}"
    answer = done.stdout.decode(errors="replace").rpartition(_MARK)
    if not answer[1] or done.returncode:
        return f"the balancing policy '{policy}' ends the process that imports it"
    text = "".join(char if char.isprintable() else " " for char in answer[2])
    return text if len(text) <= _MAX_TOLD else f"{text[: _MAX_TOLD - 3]}..."


def _account(runtime: Runtime) -> tuple[int | None, int | None]:
    """Whom workers run as, where that is somebody else."""
    if os.geteuid() != 0:
        return None, None
    user = group = None
    try:
        if runtime.user is not None:
            entry = pwd.getpwnam(runtime.user)
            user, group = entry.pw_uid, entry.pw_gid
        if runtime.group is not None:
            group = grp.getgrnam(runtime.group).gr_gid
    except KeyError:
        pass  # there is no such account, and that is said elsewhere
    return user, group
