"""What a model makes of gaps in real text: what evaluate.py --gaps prints.

The true text of a gap has an exact likelihood under a decoder that follows a plan (likelihood.py). What decoders write
there at temperature 0.8, those that revise among them, is held against the true text: how many tokens are the same, and
how many of the words that lie in the gap or reach into it the training text has.

gaps.json holds the identity of what was measured and a list of entries: measure (a key of MEASURES), decoder ('naive',
'sampler head', 'the text itself'), method of those that are sampled from, passes made, gap (tokens), value, its
standard error over sequences, and values, one for each sequence, null for one without a word there.
"""
import json
import os
from dataclasses import replace

import torch
from tqdm import tqdm

import decoding
import results
from device import autocast
from errors import InputError
from files import make_folder, write_atomically
from likelihood import log_likelihood
from metrics import WORD, mean_error, words_of
from noise import POSITIONS, uniform
from plans import make_plan
from tables import markdown, value_text

GAPS = (4, 12, 40)    # tokens: those that are no longer than a quarter of a sequence
SEQUENCES = 96        # validation sequences
BATCH = 32            # scored or decoded at a time
PASSES = (1, 2, 4, 8)    # in interleaved order, fewer than the gap has tokens
ITERATIONS = 15       # of decoders that are sampled from, as sample_simple.py has them by default
MEASURES = {'nats_per_token': 'Nats per token of the true text',
            'same_tokens': 'Share of sampled tokens that are those of the text',
            'known_words': 'Share of words in or across the gap that the training text has'}


def place(x0, gap, seed):
    """One gap somewhere in the middle half of each sequence: x0 (N, T) -> (N, T) bool."""
    N, T = x0.shape
    start = T // 4 + (uniform(seed, POSITIONS, range(N), 0, [0], x0.device) * (T // 2 - gap + 1)).long()
    at = torch.arange(T, device=x0.device)
    return (at >= start) & (at < start + gap)


def methods(model, use_sampler):
    """{name: DecoderConfig} of the ways in which gaps are filled by the head or without it."""
    revised = decoding.default_config(model, ITERATIONS, use_sampler, prefix_only=False)
    once = replace(revised, mask_ratios=())
    return {'': once, 'interleaved': replace(once, plan='interleaved', plan_passes=ITERATIONS), 'revised': revised}


class GapTable:
    """Entries of every gap, decoder and measure. evaluation: evaluate.Evaluation."""

    def __init__(self, evaluation):
        self.model, self.tokenizer, self.seed = evaluation.model, evaluation.tokenizer, evaluation.seed
        self.T = self.model.config.block_size
        self.gaps = [gap for gap in GAPS if gap <= self.T // 4]
        if not self.gaps:
            raise InputError(f'--gaps with sequences of {self.T} tokens: the shortest gap has {GAPS[0]} tokens; wanted '
                             f'a model of block_size {4 * GAPS[0]} or more')
        self.x0 = torch.from_numpy(evaluation.corpus.spread_rows('val', SEQUENCES, self.T)).to(evaluation.device)
        self.known = set(words_of(self.tokenizer.decode(evaluation.corpus.splits['train'].tolist())))
        self.decoders = {'naive': False} | ({'sampler head': True} if self.model.sampler_head is not None else {})
        self.entries = []

    def add(self, measure, gap, decoder, method, passes, values):
        found = [value for value in values if value is not None]
        value, error = mean_error(found) if found else (None, None)
        self.entries.append({'measure': measure, 'decoder': decoder, 'method': method, 'passes': passes, 'gap': gap,
                             'value': value, 'error': error, 'values': values})

    @torch.no_grad()
    def measure(self, progress):
        for gap in tqdm(self.gaps, unit='gap', disable=not progress):
            free = place(self.x0, gap, self.seed)
            self.add('known_words', gap, 'the text itself', '', 0, self.known_words(self.x0, free))
            for decoder, use_sampler in self.decoders.items():
                for passes in (n for n in PASSES if n < gap):
                    self.add('nats_per_token', gap, decoder, '', passes, self.nats(free, gap, passes, use_sampler))
                for method, config in methods(self.model, use_sampler).items():
                    x, passes = self.sample(free, replace(config, seed=self.seed))
                    same = ((x == self.x0) & free).sum(1) / gap
                    self.add('same_tokens', gap, decoder, method, passes, same.tolist())
                    self.add('known_words', gap, decoder, method, passes, self.known_words(x, free))
        return self.entries

    def nats(self, free, gap, passes, use_sampler):
        """Nats per token of the true text in the gap of each sequence, filled in interleaved order: [float]."""
        found = []
        for x0, part in zip(self.x0.split(BATCH), free.split(BATCH)):
            plan = make_plan('interleaved', self.T, passes, sequences=range(len(x0)), free=part, device=x0.device)
            found += (-log_likelihood(self.model, x0, plan, use_sampler).sum(1) / gap).tolist()
        return found

    def sample(self, free, config):
        """The sequences with their gaps filled, (N, T) ids, and the most forward passes that a batch took."""
        decoded, start = [], 0
        for x0, part in zip(self.x0.split(BATCH), free.split(BATCH)):
            decoded.append(decoding.generate(self.model, x0, part, config, range(start, start + len(x0))))
            start += len(x0)
        return torch.cat([batch.x for batch in decoded]), max(batch.passes for batch in decoded)

    def known_words(self, x, free):
        """Share of known words among those with a character in the gap of each sequence: [float or None]."""
        found = []
        for ids, gap in zip(x.tolist(), free.nonzero()[:, 1].view(len(x), -1).tolist()):
            start, end = (len(self.tokenizer.decode(ids[:at])) for at in (gap[0], gap[-1] + 1))
            words = [word.group() for word in WORD.finditer(self.tokenizer.decode(ids))
                     if word.start() < end and word.end() > start]
            found.append(sum(word in self.known for word in words) / len(words) if words else None)
        return found

    def table(self, measure):
        """Markdown of one measure: a line for each way of filling, a column for each gap; then the head minus naive."""
        entries = {(e['decoder'], e['method'], e['passes'] if measure == 'nats_per_token' else 0, e['gap']): e
                   for e in self.entries if e['measure'] == measure}
        rows = []

        def add(name, passes, cells):
            rows.append((name, passes, *(value_text(*cell) for cell in cells)))
        ways = sorted({key[:3] for key in entries}, key=lambda way: (way[2], way[1], way[0]))
        for decoder, method, passes in ways:
            of = [entries.get((decoder, method, passes, gap)) for gap in self.gaps]
            made = sorted({e['passes'] for e in of if e})
            add(f'{decoder}, {method}' if method else decoder,
                '-' if made == [0] else '-'.join(map(str, dict.fromkeys((made[0], made[-1])))),
                [(e['value'], e['error']) if e else (None, None) for e in of])
        for _, method, passes in (way for way in ways if way[0] == 'sampler head'):
            pairs = [[entries.get((name, method, passes, gap)) for name in ('sampler head', 'naive')]
                     for gap in self.gaps]
            add(f'head minus naive{", " * bool(method)}{method}', passes or '', [difference(*pair) for pair in pairs])
        return markdown(('decoder', 'forward passes', *(f'gap of {gap}' for gap in self.gaps)), rows)


def difference(a, b):
    """Mean of one entry's values minus another's and its standard error, over the sequences for which both have one."""
    pairs = [x - y for x, y in zip(a['values'], b['values']) if None not in (x, y)] if a and b else []
    return mean_error(pairs) if pairs else (None, None)


def write(evaluation, out_dir, progress, identity, overwrite):
    """Measure, print the tables and write gaps.json to out_dir.

    InputError, before anything is measured, where it holds results of another identity and may not overwrite them.
    """
    path = os.path.join(out_dir, 'gaps.json')
    gaps = GapTable(evaluation)
    make_folder(out_dir)
    if not overwrite:
        results.read(path, identity)
    with autocast(evaluation.device, evaluation.dtype):
        entries = gaps.measure(progress)
    for measure, title in MEASURES.items():
        print(f'{title}:\n\n{gaps.table(measure)}\n')
    print(f'{SEQUENCES} validation sequences of {gaps.T} tokens, {evaluation.dtype} on {evaluation.device}; samples at '
          f'temperature {methods(gaps.model, False)[""].temperature:g}')
    write_atomically(path, json.dumps({'identity': identity, 'entries': entries}, indent=1).encode())
    print(f'saved {path}')
