"""Names that flags and settings offer, apart from what they stand for: --help tells them without waiting for torch."""

# plans.py says what each does
ONE_PASS = ('wavefront', 'left-to-right', 'fronts-N')
ANY_PASSES = ('speculative', 'blocks', 'spans', 'interleaved', 'random')
DTYPES = ('float32', 'bfloat16', 'float16', 'float64')
