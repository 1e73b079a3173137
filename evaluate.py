"""Says what a checkpoint and its decoders are worth: a table, a plot, evaluation.json.

    python evaluate.py --checkpoint out-char-diffusion/ckpt.pt --evaluator out-char-ar/ckpt.pt --quick
    python evaluate.py --checkpoint out-char-diffusion/ckpt.pt --evaluator out-char-ar/ckpt.pt --judge out-judge/ckpt.pt

Every decoder (naive; wavefront; wavefront that corrects itself), order, number of trunk passes, schedule and temperature makes the same number of samples, which a causal
model that never saw samples scores. Decoders are compared at matched diversity: of a decoder's cells with so many
passes the one with the best NLL counts whose unigram entropy and distinct 4-grams are above a floor.
Finished cells are kept in evaluation.json: an interrupted grid goes on where it was.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import autoregressive
import diffusion
from checkpoint import load_model, want_generator, want_vocabulary
from corpus import DATA_DIR, Corpus, write_atomically
from device import autocast, pick_device, pick_dtype
from diffusion import Decoder, linear_ratios
from errors import InputError, run
from judge import Judge
from metrics import describe, mean_error, words_of

DECODERS = ('naive', 'wavefront', 'corrected')    # corrected: the wavefront redoes its own worst tokens after each pass
# order of the grid -> what it sets in the decoder
ORDERS = {
    'random': dict(order='random'),                                                    # ancestral sampling of MDLM
    'confidence': dict(order='confidence', revise=False),                              # MaskGIT: kept once, kept for good
    'noise': dict(order='confidence', revise=False, randomness_strength=1.0),          # and annealed Gumbel noise on it
    'remask': dict(order='confidence', revise=True),                                   # kept tokens compete again
    'remask-noise': dict(order='confidence', revise=True, randomness_strength=2.0),
    'critic': dict(order='critic', revise=True),
}
LONG, MIDDLE, SHORT = (0.95, 0.05), (0.7, 0.1), (0.4, 0.01)    # share remasked after the first and before the last pass
SCHEDULES = {'confidence': [LONG], 'noise': [LONG], 'remask': [LONG, SHORT], 'remask-noise': [LONG, SHORT], 'critic': [LONG, MIDDLE]}
CORRECTED_ORDERS = ('remask', 'critic')    # the others keep what corrections would redo
CORRECTED_PASSES = 16    # at most: with more, the trunk has passes enough to correct
PASSES = (1, 2, 4, 8, 16, 32, 64)
TEMPERATURES = ((0.4, 0.4), (0.8, 0.8), (1.0, 1.0), (0.8, 0.1))    # of the first and the last pass
COLUMNS = ('nll', 'entropy', 'distinct4', 'spelt', 'unknown_chars', 'judge')


@dataclass(frozen=True)
class Cell:
    decoder: str           # a name in DECODERS
    order: str             # a name in ORDERS
    passes: int
    start: float           # of the ratio schedule
    end: float
    temperature: float     # of the first pass
    end_temperature: float    # of the last
    corrections: int

    @property
    def key(self):
        return (f'{self.decoder} {self.order} {self.passes} passes, ratios {self.start:.2f} to {self.end:.2f}, '
                f'temperature {heat_text(self.temperature, self.end_temperature)}, corrections {self.corrections}')

    def settings(self, seed):
        return Decoder(use_sampler=self.decoder != 'naive', ratios=tuple(linear_ratios(self.passes, self.start, self.end)),
                       temperature=self.temperature, end_temperature=self.end_temperature, corrections=self.corrections, seed=seed,
                       **ORDERS[self.order])


def grid(decoders, orders, passes, temperatures, corrections=24):
    """Every cell that differs from the others in what it does: one pass has no order and no schedule."""
    cells = []
    for decoder, order, n, (temperature, last) in itertools.product(decoders, orders, passes, temperatures):
        # random order keeps as many tokens in each pass: from (n - 1) / n to 1 / n
        schedules = [(1 - 1 / n, 1 / n)] if order == 'random' else SCHEDULES[order]
        if decoder == 'corrected':
            schedules = schedules if order in CORRECTED_ORDERS and n <= CORRECTED_PASSES else []
        elif n == 1 and order != orders[0]:
            schedules = []
        if n == 1:
            schedules = schedules[:1]
        redone = corrections if decoder == 'corrected' else 0
        cells += [Cell(decoder, order, n, start, end, temperature, last if n > 1 else temperature, redone) for start, end in schedules]
    return list(dict.fromkeys(cells))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--checkpoint', default='out-char-diffusion/ckpt.pt', help='the masked-diffusion model')
    add('--evaluator', default='out-char-ar/ckpt.pt', help='the causal model that scores samples and is the peer')
    add('--judge', help='a sequence scorer, for one more column')
    add('--out-dir', default='out-evaluation', help='where evaluation.json and the plots go')
    add('--quick', action='store_true', help='a small grid: minutes on a laptop')
    add('--decoders', default=None, help=f'some of {",".join(DECODERS)}')
    add('--corrections', type=int, default=24, help='of the corrected decoder, after each pass')
    add('--orders', default=None, help=f'some of {",".join(ORDERS)}')
    add('--passes', default=None, help='numbers of trunk passes (default: 1 to 64)')
    add('--temperatures', default=None, help='temperatures, 0.8-0.1 falls from the first pass to the last (default: 0.4,0.8,1,0.8-0.1)')
    add('--num-samples', type=int, default=32, help='samples in a cell')
    add('--entropy-slack', type=float, default=0.4, help='floor of diversity: nats of unigram entropy below real text')
    add('--distinct-slack', type=float, default=0.5, help='floor of diversity: share of distinct 4-grams lost against real text')
    add('--data-dir', default=DATA_DIR, help='where corpora are kept')
    add('--seed', type=int, default=1337)
    add('--device', default='auto')
    add('--dtype', default='auto')
    add('--no-progress', action='store_true', help='no bar')
    return parser.parse_args()


def heat(text):
    """'0.8' -> (0.8, 0.8), '0.8-0.1' -> (0.8, 0.1): temperatures of the first and the last pass."""
    values = [float(part) for part in text.split('-')]
    if len(values) > 2:
        raise ValueError
    return values[0], values[-1]


def heat_text(start, end):
    return f'{start:g}' + (f' to {end:g}' if end != start else '')


def listed(text, kind, name, allowed=None):
    """'1,2' -> (1, 2). InputError names what cannot be read or is not allowed."""
    try:
        values = tuple(kind(part) for part in text.split(','))
    except ValueError:
        raise InputError(f'--{name} is {text!r}, wanted numbers such as 1,4,16') from None
    bad = [part for part, v in zip(text.split(','), values) if (v not in allowed if allowed else not (min(v) if kind is heat else v) > 0)]
    if bad:
        raise InputError(f'--{name} has {bad[0]}, wanted ' + (f'some of {", ".join(allowed)}' if allowed else 'numbers above 0'))
    return values


class Evaluation:
    """The models, the reference texts and the cells measured so far."""

    def __init__(self, args):
        self.device = pick_device(args.device)
        self.dtype = pick_dtype(args.dtype, self.device)
        self.seed, self.n = args.seed, args.num_samples
        self.model, self.tokenizer, saved = load_model(args.checkpoint)
        want_generator(self.model, args.checkpoint)
        self.evaluator, _, peer = load_model(args.evaluator)
        if (self.evaluator.config.attention_type, self.evaluator.config.model_mode) != ('causal', 'language_model'):
            raise InputError(f'the evaluator {args.evaluator!r} is not causal; python train.py config/train_char_ar.py trains one')
        want_vocabulary(peer['corpus'], args.evaluator, saved['corpus'])
        self.length = min(self.model.config.block_size, self.evaluator.config.block_size + 1)
        self.judge = None
        if args.judge:
            model, _, other = load_model(args.judge)
            want_vocabulary(other['corpus'], args.judge, saved['corpus'])
            self.judge = Judge(model.to(self.device), args.judge, other['corpus'])
        self.corpus = Corpus(saved['corpus']['name'], args.data_dir)
        want_vocabulary(saved['corpus'], args.checkpoint, self.corpus.meta)
        self.model, self.evaluator = self.model.to(self.device), self.evaluator.to(self.device)
        self.vocabulary = set(words_of(self.tokenizer.decode(self.corpus.splits['train'].tolist())))
        files = {name: digest(path) for name, path in (('checkpoint', args.checkpoint), ('evaluator', args.evaluator), ('judge', args.judge)) if path}
        self.identity = {'files': files, 'seed': args.seed, 'num_samples': self.n, 'length': self.length, 'dtype': self.dtype}
        self.path = os.path.join(args.out_dir, 'evaluation.json')
        self.result = {'identity': self.identity, 'reference': {}, 'cells': {}}
        try:
            os.makedirs(args.out_dir, exist_ok=True)
        except OSError as error:
            raise InputError(f'cannot write --out-dir {args.out_dir!r}: {error.strerror}') from error
        if os.path.exists(self.path):
            with open(self.path) as f:
                before = json.load(f)
            if before.get('identity') == self.identity:
                self.result = before
        self.result |= {'command': shlex.join(['python', *sys.argv]), 'checkpoint': args.checkpoint, 'corpus': saved['corpus']['name'],
                        'hardware': f'{platform.machine()}, {os.cpu_count()} cores, {self.device}', 'torch': torch.__version__}

    def save(self):
        write_atomically(self.path, json.dumps(self.result, indent=1).encode())

    def measure(self, x):
        """Every measure of samples x (B, T) ids, {name: [value, standard error]}."""
        with autocast(self.device, self.dtype), torch.no_grad():
            nll = torch.cat([autoregressive.nll(self.evaluator, self.evaluator, part).mean(1) for part in x.split(64)]).tolist()
            scores = [s for part in x.split(64) for s in self.judge.score(part).tolist()] if self.judge else []
        texts = [self.tokenizer.decode(ids) for ids in x.tolist()]
        return describe(texts, nll, self.vocabulary) | ({'judge': list(mean_error(scores))} if scores else {})

    def references(self, temperatures):
        """Real validation text, the autoregressive peer's samples, and the checkpoint's bound."""
        found = self.result['reference']
        real = torch.from_numpy(self.corpus.spread_rows('val', self.n, self.length)).to(self.device)
        if 'real text' not in found:
            found['real text'] = self.measure(real)
            rows = torch.from_numpy(self.corpus.spread_rows('val', 432, self.model.config.block_size)).to(self.device)
            with autocast(self.device, self.dtype):
                bound = diffusion.validate(self.model, rows, 64, self.seed, self.model.sampler_head is not None, self.model.critic_head is not None)
            bits = 1 / math.log(2) / self.corpus.chars_per_token
            self.result['validation'] = bound | {'bits_per_character': bound['nelbo'] * bits, 'bits_error': bound['nelbo_error'] * bits}
        for temperature in temperatures:
            name = f'autoregressive, temperature {temperature:g}'
            if name not in found:
                clock = time.time()
                with autocast(self.device, self.dtype):
                    x = autoregressive.generate(self.evaluator, real[:, :1], self.length, range(self.n), self.seed, temperature)
                found[name] = self.measure(x) | {'seconds': time.time() - clock, 'temperature': temperature}
        self.save()

    def decode(self, cell):
        """Samples of a cell and the seconds they took."""
        x = torch.full((self.n, self.length), self.tokenizer.mask_id, device=self.device)
        clock = time.time()
        with autocast(self.device, self.dtype):
            x, _, passes, waves = diffusion.generate(self.model, x, x == self.tokenizer.mask_id, cell.settings(self.seed), range(self.n))
        if self.device.startswith('cuda'):
            torch.cuda.synchronize()
        return x, time.time() - clock, passes, waves

    def run(self, cells, progress):
        todo = [cell for cell in cells if cell.key not in self.result['cells']]
        with tqdm(total=sum(c.passes for c in todo), unit='pass', disable=not progress) as bar:
            if todo:    # the first call of a process is slow; it is nobody's
                self.decode(Cell(todo[0].decoder, todo[0].order, 1, 0.0, 0.0, 1.0, 1.0, 0))
            for cell in todo:
                bar.set_description(cell.key)
                x, seconds, passes, waves = self.decode(cell)
                self.result['cells'][cell.key] = vars(cell) | self.measure(x) | {
                    'seconds': seconds, 'passes_made': passes, 'waves': waves, 'example': self.tokenizer.decode(x[0].tolist())}
                self.save()
                bar.update(cell.passes)


def digest(path):
    with open(path, 'rb') as f:
        return hashlib.sha256(f.read()).hexdigest()


# -----------------------------------------------------------------------------
# the frontier

def admitted(entry, floor):
    """Is an entry as diverse as the floor {'entropy': ..., 'distinct4': ...} asks?"""
    return all(entry[name][0] >= least for name, least in floor.items())


def frontier(cells, floor):
    """{decoder: [best admitted cell by NLL with each number of passes]}, in order of passes."""
    best = {}
    for cell in filter(lambda c: admitted(c, floor), cells):
        at = best.setdefault(cell['decoder'], {})
        if cell['passes'] not in at or cell['nll'][0] < at[cell['passes']]['nll'][0]:
            at[cell['passes']] = cell
    return {decoder: [at[n] for n in sorted(at)] for decoder, at in best.items()}


def counted(n):
    return f'{n} trunk pass' + ('es' if n > 1 else '')


def sentence(lines):
    """How many passes and seconds the sampler saves against the best naive decoder."""
    helped = [c for decoder, cells in lines.items() if decoder != 'naive' for c in cells]
    if not helped or not lines.get('naive'):
        return 'no comparison: a decoder has no samples as diverse as the floor asks, or was not run.'
    naive = min(lines['naive'], key=lambda c: c['nll'][0])
    as_good = [c for c in helped if c['nll'][0] <= naive['nll'][0]]
    if not as_good:
        best = min(helped, key=lambda c: c['nll'][0])
        return (f'The wavefront does not reach the best naive decoder ({naive["nll"][0]:.2f} nats, {counted(naive["passes"])}): '
                f'its best is {best["nll"][0]:.2f} nats with {counted(best["passes"])}.')
    first = min(as_good, key=lambda c: (c['passes'], c['seconds']))
    return (f'At matched diversity the wavefront needs {counted(first["passes"])} and {first["seconds"]:.1f} s for '
            f'{first["nll"][0]:.2f} nats; the best naive decoder found ({naive["order"]}) needs {counted(naive["passes"])} and {naive["seconds"]:.1f} s for {naive["nll"][0]:.2f}: '
            f'{naive["passes"] / first["passes"]:.0f} times the passes and {naive["seconds"] / first["seconds"]:.1f} times the seconds.')


def beats(one, other):
    """Is one as good as the other or better in likelihood, both diversities and spelling at once?"""
    return one['nll'][0] <= other['nll'][0] and all(one[name][0] >= other[name][0] for name in ('entropy', 'distinct4', 'spelt'))


def outdone(cells):
    """The fewest passes P such that every naive cell is beaten by a wavefront cell of at most P passes, or None."""
    waves = [c for c in cells if c['decoder'] != 'naive']
    needed = [min((w['passes'] for w in waves if beats(w, n)), default=math.inf) for n in cells if n['decoder'] == 'naive']
    return max(needed) if needed and max(needed) < math.inf else None


def row(name, entry):
    figures = [f'{entry[c][0]:.3f} ±{entry[c][1]:.3f}' if c in entry else '-' for c in COLUMNS]
    return f'| {name} | ' + ' | '.join(figures) + f' | {entry["seconds"]:.1f} |' if 'seconds' in entry else f'| {name} | ' + ' | '.join(figures) + ' | - |'


def table(result, lines):
    """The short table: references, then each decoder's frontier. Markdown."""
    out = ['| decoder | NLL, nats | entropy, nats | distinct 4-grams | words spelt right | characters in unknown words | judge | seconds |',
           '|---|---|---|---|---|---|---|---|']
    out += [row(name, entry) for name, entry in result['reference'].items()]
    for decoder in DECODERS:
        for cell in lines.get(decoder, []):
            out.append(row(f'{decoder}, {counted(cell["passes"])} ({cell["order"]}, {cell["start"]:.2f} to {cell["end"]:.2f}, '
                           f'temperature {heat_text(cell["temperature"], cell["end_temperature"])})', cell))
    return '\n'.join(out)


def plot(result, lines, out_dir):
    """NLL at matched diversity against trunk passes and against seconds: frontier.png and frontier.svg."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    colours = {'naive': '#b2502f', 'wavefront': '#7fb3c8', 'corrected': '#1f6f8b'}
    for axis, name, label in ((axes[0], 'passes', 'trunk passes'), (axes[1], 'seconds', f'seconds for {result["identity"]["num_samples"]} samples')):
        for decoder, cells in lines.items():
            axis.errorbar([c[name] for c in cells], [c['nll'][0] for c in cells], [c['nll'][1] for c in cells], marker='o', ms=4,
                          capsize=2, color=colours[decoder], label=decoder)
        axis.axhline(result['reference']['real text']['nll'][0], color='black', lw=1, ls=':', label='real text')
        axis.axhline(peer(result)['nll'][0], color='grey', lw=1, ls='--', label='autoregressive, same size')
        axis.set(xscale='log', xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel('NLL under the evaluator, nats per token')
    axes[0].set_xticks(PASSES, map(str, PASSES))
    axes[0].legend()
    figure.suptitle(f'{result["corpus"]}: best cell at matched diversity, bars are standard errors')
    figure.tight_layout()
    for kind in ('png', 'svg'):
        figure.savefig(os.path.join(out_dir, f'frontier.{kind}'), dpi=120)
    plt.close(figure)


def peer(result):
    """The autoregressive samples at the temperature nearest to 1."""
    return min((e for e in result['reference'].values() if 'temperature' in e), key=lambda e: abs(e['temperature'] - 1))


def main():
    args = arguments()
    decoders = listed(args.decoders, str, 'decoders', DECODERS) if args.decoders else DECODERS
    orders = listed(args.orders, str, 'orders', ORDERS) if args.orders else tuple(ORDERS)
    if args.quick:
        passes, temperatures = (1, 4, 16), ((0.4, 0.4), (0.8, 0.1))
        orders = orders if args.orders else ('remask-noise', 'critic')
    else:
        passes, temperatures = PASSES, TEMPERATURES
    passes = listed(args.passes, int, 'passes') if args.passes else passes
    temperatures = listed(args.temperatures, heat, 'temperatures') if args.temperatures else temperatures
    if args.corrections < 1:
        raise InputError(f'--corrections is {args.corrections}, wanted at least 1')
    if args.num_samples < 2:
        raise InputError(f'--num-samples is {args.num_samples}, wanted at least 2')
    evaluation = Evaluation(args)
    if evaluation.model.critic_head is None:
        if args.orders and 'critic' in orders:
            raise InputError(f'{args.checkpoint!r} has no critic head, which the order critic needs')
        orders = tuple(order for order in orders if order != 'critic')
    if evaluation.model.sampler_head is None:
        if args.decoders and decoders != ('naive',):
            raise InputError(f'{args.checkpoint!r} has no sampler head, which --decoders {args.decoders} need')
        decoders = ('naive',)
    cells = grid(decoders, orders, passes, temperatures, args.corrections)
    if not cells:
        raise InputError(f'nothing to measure: --decoders {",".join(decoders)} with --orders {",".join(orders)}; corrected wants '
                         f'{" or ".join(CORRECTED_ORDERS)}')
    evaluation.references(sorted({first for first, _ in temperatures}))
    evaluation.run(cells, progress=not args.no_progress and sys.stderr.isatty())

    # report
    result = evaluation.result
    real = result['reference']['real text']
    floor = {'entropy': real['entropy'][0] - args.entropy_slack, 'distinct4': real['distinct4'][0] * (1 - args.distinct_slack)}
    lines = frontier([result['cells'][cell.key] for cell in cells], floor)
    bound = result['validation']
    print(f'{args.checkpoint} on {result["corpus"]}: validation NELBO {bound["nelbo"]:.4f} ±{bound["nelbo_error"]:.4f} nats per token, '
          f'{bound["bits_per_character"]:.4f} ±{bound["bits_error"]:.4f} bits per character')
    print(f'{evaluation.n} samples of {evaluation.length} tokens in each of {len(cells)} cells, seed {args.seed}, {result["hardware"]}, {evaluation.dtype}, '
          f'torch {result["torch"]}; floor of diversity: entropy {floor["entropy"]:.3f}, distinct 4-grams {floor["distinct4"]:.3f}\n')
    result['floor'], result['table'], result['sentence'] = floor, table(result, lines), sentence(lines)
    evaluation.save()
    plot(result, lines, args.out_dir)
    print(result['table'] + f'\n\n{evaluation.path}, frontier.png and frontier.svg hold the rest.')
    most = outdone([result['cells'][cell.key] for cell in cells])
    if most:
        print(f'Every naive cell, up to {max(passes)} passes, is beaten in NLL, entropy, distinct 4-grams and spelling at once by a '
              f'wavefront cell of at most {most} passes.')
    print(result['sentence'])


if __name__ == '__main__':
    run(main)
