"""Settings of the process that must stand before torch is imported: import this first.

Threads of OpenMP spin while they wait for one another. Beside another busy process they then wait for a processor that
the spinning keeps busy: two samples took 75 seconds in place of one (docs/experiments.md). What the user has set stays.
"""
import os

os.environ.setdefault('GOMP_SPINCOUNT', '1000')
