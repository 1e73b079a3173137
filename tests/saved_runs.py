"""Files as sample_simple.py --save writes them, for the tests of the pages that show them."""
import json
import re

import numpy as np

MASK = 9
CHARS = ['h', 'e', 'l', 'o', 'x', '\n', '!', '<', '>']
SETTINGS = {'iterations': 2, 'judge_checkpoint_name': None, 'use_sampler': True, 'save': 'a.json', 'seed_text': 'h'}


def ids_of(text):
    return [MASK if c == '_' else CHARS.index(c) for c in text]


def one_pass(iteration, start, before, after, wave, score, remasked=(), corrected=()):
    return {'iteration': iteration, 'block_start': start, 'input_masked': ids_of(before),
            'output_unmasked': ids_of(after), 'wave': wave, 'remask_score': score, 'remasked_indices': list(remasked),
            'corrected_indices': list(corrected)}


def tiny(**settings):
    """What --save writes for one sample of two blocks: h and ! are given, an x is remasked and becomes an l."""
    passes = [one_pass(0, 0, 'h___', 'helx', [0, 1, 2, 3], [0, 0.1, 0.2, 0.9], [3]),
              one_pass(1, 0, 'hel_', 'hell', [0, 0, 0, 1], [0, 0.1, 0.2, 0.3]),
              one_pass(0, 2, 'll__', 'llo\n', [0, 0, 1, 2], [0, 0, 0.5, 1.0])]
    sample = {'text': 'hello\n!', 'tokens': ids_of('hello\n!'), 'quality': 0.25, 'iterations': passes}
    return {'schema': 2, 'settings': SETTINGS | settings, 'mask_id': MASK, 'seconds': 0.5, 'forward_passes': 3,
            'waves': 6, 'vocabulary': {'name': 'toy', 'kind': 'char', 'chars': CHARS, 'vocab_size': MASK + 1},
            'samples': [sample]}


STATES = ['h░░░░░!', 'he░░░░!', 'hel░░░!', 'helx░░!', 'hel░░░!', 'hell░░!', 'hell░░!', 'hello░!', 'hello\n!']


def data_of(html):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.S).group(1))


def hostile():
    """A file whose every text tries to become part of the page."""
    attack = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'
    saved = tiny(seed_text=attack, checkpoint='"\'--><svg onload=window.hacked=1>&lt;b&gt;')
    saved['settings'][attack] = 'x'
    saved['vocabulary']['chars'] = [attack, '&lt;', '"', "'", '<!--', '\n', '\u2028', '{{data}}', '\\u003c']
    return saved


def large(length, passes, n, seed=0):
    """n samples of random tokens, waves and scores, of which each pass fills as many as the default schedule asks."""
    rng, saved = np.random.default_rng(seed), tiny()
    saved['vocabulary']['chars'], saved['mask_id'] = [chr(33 + i) for i in range(64)], 64
    saved['samples'] = [{'text': '', 'tokens': [0] * length, 'quality': None, 'iterations': []} for _ in range(n)]
    for sample in saved['samples']:
        tokens, mask = np.full(length, 64), np.full(length, True)
        for k in range(passes):
            before, tokens = np.where(mask, 64, tokens), np.where(mask, rng.integers(0, 64, length), tokens)
            wave, mask = np.where(mask, rng.integers(0, 50, length), 0), rng.random(length) < 0.95 - 0.065 * k
            sample['iterations'].append({
                'iteration': k, 'block_start': 0, 'input_masked': before.tolist(), 'output_unmasked': tokens.tolist(),
                'wave': wave.tolist(), 'remask_score': rng.random(length).tolist(),
                'remasked_indices': np.flatnonzero(mask).tolist() if k < passes - 1 else []})
        sample['tokens'] = tokens.tolist()
    return saved


def corrected():
    """A pass whose e a correction drew again, in wave 3, and a later pass that fills the last l once more."""
    saved = tiny()
    saved['samples'][0]['iterations'] = [
        one_pass(0, 0, 'h___', 'helx', [0, 3, 2, 0], [0, 0.1, 0.2, 0.9], [3], corrected=[1]),
        one_pass(1, 0, 'hel_', 'hell', [0, 0, 0, 1], [0, 0.1, 0.2, 0.3]),
        one_pass(0, 2, 'll__', 'llo\n', [0, 0, 1, 2], [0, 0, 0.5, 1.0])]
    return saved
