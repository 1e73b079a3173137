"""Settings of the process that must stand before torch is imported: import this first.

Threads of OpenMP spin while they wait for one another. Beside another busy process they then wait for a processor that
the spinning keeps busy, which made two samples take 32 seconds. A short spin costs nothing on a quiet machine
(docs/training.md). What the user has set stays.
"""
import os

os.environ.setdefault('GOMP_SPINCOUNT', '1000')
