"""Settings of the process that must stand before torch is imported: import this first.

Threads of OpenMP spin while they wait for one another. Beside another busy process they then wait for a processor that
the spinning keeps busy: two samples took 75 seconds in place of one (docs/experiments.md). What the user has set stays.
Ctrl-C while torch is being imported is one word, not a traceback.
"""
import os
import sys

os.environ.setdefault('GOMP_SPINCOUNT', '1000')


def show(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        print('stopped', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = show
