"""What a model makes of gaps in real text: what evaluate.py --gaps prints.

The true text of a gap has an exact likelihood under a decoder that follows a plan (likelihood.py). What decoders write
there at temperature 0.8, those that revise among them, is held against the true text: how many tokens are the same, and
how many of the words that lie in the gap or reach into it the training text has.

gaps.json holds the identity of what was measured and a list of entries: measure (a key of MEASURES), decoder, passes,
gap (tokens), value and its standard error over sequences.
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
from plans import beside_given, make_plan

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


def decoders(model):
    """{name: DecoderConfig} of those that are sampled from."""
    heads = {'naive': False} | ({'sampler head': True} if model.sampler_head is not None else {})
    found = {}
    for name, use_sampler in heads.items():
        revised = decoding.default_config(model, ITERATIONS, use_sampler, prefix_only=False)
        found[name] = replace(revised, mask_ratios=())
        found[f'{name}, interleaved'] = replace(found[name], plan='interleaved', plan_passes=ITERATIONS)
        found[f'{name}, revised by {revised.order}'] = revised
    return found


class GapTable:
    """Entries of every gap, decoder and measure. evaluation: evaluate.Evaluation."""

    def __init__(self, evaluation):
        self.model, self.tokenizer, self.seed = evaluation.model, evaluation.tokenizer, evaluation.seed
        self.T = self.model.config.block_size
        self.gaps = [gap for gap in GAPS if gap <= self.T // 4]
        if not self.gaps:
            raise InputError(f'--gaps with sequences of {self.T} tokens: the shortest gap has {GAPS[0]} tokens; wanted '
                             f'a model of block_size {4 * GAPS[0]} or more')
        evaluation.corpus.check(self.T)
        self.x0 = torch.from_numpy(evaluation.corpus.spread_rows('val', SEQUENCES, self.T)).to(evaluation.device)
        self.known = set(words_of(self.tokenizer.decode(evaluation.corpus.splits['train'].tolist())))
        self.entries = []

    def add(self, measure, decoder, passes, gap, values):
        value, error = mean_error(values)
        self.entries.append({'measure': measure, 'decoder': decoder, 'passes': passes, 'gap': gap, 'value': value,
                             'error': error})

    @torch.no_grad()
    def measure(self, progress):
        for gap in tqdm(self.gaps, unit='gap', disable=not progress):
            free = place(self.x0, gap, self.seed)
            for passes in (n for n in PASSES if n < gap):
                for name, use_sampler in (('naive', False), ('sampler head', True)):
                    if not use_sampler or self.model.sampler_head is not None:
                        self.add('nats_per_token', name, passes, gap, self.nats(free, passes, use_sampler))
            for name, config in decoders(self.model).items():
                x = self.sample(free, replace(config, seed=self.seed))
                same = ((x == self.x0) & free).sum(1) / gap
                self.add('same_tokens', name, config.passes, gap, same.tolist())
                self.add('known_words', name, config.passes, gap, self.known_words(x, free))
            self.add('known_words', 'the text itself', 0, gap, self.known_words(self.x0, free))
        return self.entries

    def nats(self, free, passes, use_sampler):
        """Nats per token of the true text in the gap of each sequence, filled in interleaved order: [float]."""
        found = []
        for x0, part in zip(self.x0.split(BATCH), free.split(BATCH)):
            plan = make_plan('interleaved', self.T, passes, sequences=range(len(x0)), device=x0.device)
            log_prob = log_likelihood(self.model, x0, beside_given(plan, part), use_sampler)
            found += (-(log_prob * part.cpu()).sum(1) / part.sum(1).cpu()).tolist()
        return found

    def sample(self, free, config):
        """The sequences with their gaps filled, (N, T) ids."""
        return torch.cat([
            decoding.generate(self.model, x0, part, config, range(start, start + len(x0))).x
            for start, x0, part in zip(range(0, SEQUENCES, BATCH), self.x0.split(BATCH), free.split(BATCH))])

    def known_words(self, x, free):
        """Share of known words among those with a character in the gap, for each sequence that has one: [float]."""
        found = []
        for ids, gap in zip(x.tolist(), free.nonzero()[:, 1].view(len(x), -1).tolist()):
            start, end = (len(self.tokenizer.decode(ids[:at])) for at in (gap[0], gap[-1] + 1))
            words = [word.group() for word in WORD.finditer(self.tokenizer.decode(ids))
                     if word.start() < end and word.end() > start]
            if words:
                found.append(sum(word in self.known for word in words) / len(words))
        return found

    def table(self, measure):
        """Markdown of one measure: a line for each decoder and number of passes, a column for each gap."""
        entries = [e for e in self.entries if e['measure'] == measure]
        lines = ['| decoder | forward passes | ' + ' | '.join(f'gap of {gap}' for gap in self.gaps) + ' |',
                 '|' + '---|' * (2 + len(self.gaps))]
        for decoder, passes in sorted({(e['decoder'], e['passes']) for e in entries}, key=lambda key: key[::-1]):
            cells = {e['gap']: f'{e["value"]:.3f} ±{e["error"]:.3f}' for e in entries
                     if (e['decoder'], e['passes']) == (decoder, passes)}
            lines.append(f'| {decoder} | {passes or "-"} | ' + ' | '.join(cells.get(g, '-') for g in self.gaps) + ' |')
        return '\n'.join(lines)


def write(evaluation, out_dir, progress, identity, overwrite):
    """Measure, print the tables and write gaps.json to out_dir.

    InputError, before anything is measured, where it holds results of another identity and may not overwrite them.
    """
    path = os.path.join(out_dir, 'gaps.json')
    make_folder(out_dir)
    if not overwrite:
        results.read(path, identity)
    gaps = GapTable(evaluation)
    with autocast(evaluation.device, evaluation.dtype):
        entries = gaps.measure(progress)
    write_atomically(path, json.dumps({'identity': identity, 'entries': entries}, indent=1).encode())
    for measure, title in MEASURES.items():
        print(f'{title}:\n\n{gaps.table(measure)}\n')
    print(f'{SEQUENCES} validation sequences of {gaps.T} tokens, {evaluation.dtype} on {evaluation.device}; samples at '
          f'temperature 0.8. Written to {path}')
