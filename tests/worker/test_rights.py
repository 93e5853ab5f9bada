"""Workers have no rights that only the supervisor uses."""

import subprocess
import sys

from expressgateway.worker.rights import GIVEN_UP

SCRIPT = """
from expressgateway.worker.rights import give_up
assert give_up()
assert give_up()
print(open("/proc/self/status").read())
import subprocess
print(subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout)
"""


def test_they_are_given_up_and_not_handed_on() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    sets = [
        line.split() for line in done.stdout.splitlines() if line.startswith(("CapEff", "CapPrm", "CapAmb"))
    ]
    ours, theirs = sets[:3], sets[3:]
    assert len(ours) == len(theirs) == 3
    for name, mask in ours:
        assert not any(int(mask, 16) >> bit & 1 for bit in GIVEN_UP.values()), name
    (ambient,) = [mask for name, mask in theirs if name.startswith("CapAmb")]
    assert not any(int(ambient, 16) >> bit & 1 for bit in GIVEN_UP.values())
