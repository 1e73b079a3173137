"""Settings of the process that must stand before torch is imported: import this first.

Threads of OpenMP spin while they wait for one another. Beside another busy process they then wait for a processor that
the spinning keeps busy: two samples took 75 seconds in place of one (docs/experiments.md). What the user has set stays.
Ctrl-C while torch is being imported is one word, not a traceback. A stream that was closed is the null device.
"""
import os
import sys

os.environ.setdefault('GOMP_SPINCOUNT', '1000')
sys.stdout, sys.stderr = (stream or open(os.devnull, 'w') for stream in (sys.stdout, sys.stderr))


def rank_and_world():
    """The number of this process and how many there are in the run, as torchrun says; (0, 1) where nobody says both."""
    try:
        rank, world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    except (KeyError, ValueError):
        return 0, 1
    return (rank, world) if world > 1 else (0, 1)


def show(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        print('stopped', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = show
