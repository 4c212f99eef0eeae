"""torchrun's processes: joining them, waiting for each other, and exchanging values."""

import atexit
import contextlib
import datetime
import os
import sys

from classification import RequestError

# Set by torchrun: the number of processes, this one's rank, and its rank on this machine.
PROCESSES, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


def join_processes():
    """Join torchrun's processes, if there are several; only rank 0 prints from now on."""
    if PROCESSES == 1:
        return
    import torch.distributed as dist

    # gloo notices by itself that a rank has died, but not that its machine has lost its power
    dist.init_process_group("gloo", timeout=datetime.timedelta(hours=1))
    # else, seen once in PyTorch 2.15, signal 6 at the end: a thread of C++ still ran
    atexit.register(dist.destroy_process_group)
    if RANK != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def gather(value):
    """[the `value` of each process, by rank]; also a barrier. RequestError if one has died."""
    if PROCESSES == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * PROCESSES
    try:
        dist.all_gather_object(values, value)
    except RuntimeError:
        raise RequestError("another process has ended; repeat the command to continue") from None
    return values


@contextlib.contextmanager
def first_process_first():
    """On each machine one process runs the block first: the others find what it has converted."""
    if LOCAL_RANK != 0:
        gather(None)  # until the first has converted
    yield
    if LOCAL_RANK == 0:
        gather(None)
