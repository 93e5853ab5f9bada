"""The last word on signals: who has ended is asked nothing any more."""

import asyncio
import signal
from collections.abc import Collection


async def ignore(numbers: Collection[signal.Signals]) -> None:
    """Ignore these, which the running loop handles, for good. To be called when nothing is left to do.

    A loop that closes would complain of a signal on standard error, for it keeps its handlers longer than the
    place where they write to; and once it is closed, a signal would end the process with another exit code.
    """
    loop = asyncio.get_running_loop()
    await loop.shutdown_default_executor()  # its threads would take what this one does not
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    for number in numbers:
        loop.remove_signal_handler(number)  # which has it end the process, for a moment
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
