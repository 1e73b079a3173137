"""The likelihood of each decoder against passes, steps and seconds: what evaluate.py --likelihood prints and draws.

likelihood.json is a list of entries: decoder ('naive', 'sampler_head', 'ar_baseline', 'nelbo'), plan, passes (at most),
passes_made by a batch of samples (speculative decoding may be done sooner), waves (its sequential steps of filling),
nats_per_token and its standard error over sequences, minus_baseline and minus_baseline_error the mean difference from
the autoregressive baseline on the same sequences, bits_per_character, seconds for that batch and seconds_1 for one
sample, at temperature 1, all decoders by turns. What they depend on is in likelihood_identity.json.
"""
import json
import os
from contextlib import suppress

import torch
from tqdm import tqdm

import autoregressive
import decoding
import diffusion
import figures
import results
from corpus import bits_per_nat
from device import autocast
from errors import InputError
from files import make_folder, require_file, write_atomically
from filling import HeadFiller
from likelihood import log_likelihood
from metrics import mean_error
from plans import make_plan
from recipes import joined
from tables import markdown, value_text
from timing import in_turn, medians

SEQUENCES = 432    # validation sequences at most, as many as train.py's evaluations have
BATCH = 32         # sequences scored, and sampled for the seconds, at a time
ROUNDS = 3         # of the seconds, after a warm-up
FRONTS = (4, 16)
PASSES = (1, 2, 4, 8, 16)
# how tables and figures say the decoders of likelihood.json
NAMES = {'naive': 'naive', 'sampler_head': 'sampler head', 'ar_baseline': 'autoregressive, same-size trunk',
         'nelbo': 'transformer alone (bound)'}
HIGHEST = 1.4      # of the figure's bits, as a multiple of the lowest: what is above is named at the edge
COLUMNS = ('decoder', 'plan', 'forward passes', 'steps', 'nats per token', 'minus autoregression',
           'bits per character', 'seconds, 1 sample', f'seconds, {BATCH} samples')


def list_decoders(model, passes, plans=()):
    """(decoder, plan, passes) of every line: naive and with the head, each plan in the numbers of passes it takes.

    plans: the names of those that are wanted, () for all. InputError for one that has no line.
    """
    T = model.config.block_size
    found = [('naive', plan, n) for plan in ('random', 'interleaved') for n in passes]
    found += [('naive', 'blocks', T)]    # one token in each pass: how the trunk reads text
    if model.sampler_head is not None:
        fronts = [f'fronts-{n}' for n in FRONTS]
        found += [('sampler_head', plan, 1) for plan in ('wavefront', 'left-to-right', *fronts)]
        found += [('sampler_head', plan, n) for plan in ('interleaved', 'spans', 'blocks') for n in passes if n > 1]
        allowed = [n for n in passes if 1 < n < T] + [T]    # at last as many as it takes
        found += [('sampler_head', 'speculative', n) for n in allowed]
    there = list(dict.fromkeys(plan for _, plan, _ in found))
    for plan in plans:
        if plan not in there:
            raise InputError(f'--plans has {plan!r}, wanted some of {",".join(there)}, which are all that this model '
                             f'and these --passes have')
    return [line for line in found if not plans or line[1] in plans]


def plan_of(model, name, passes, seed, sequences, device):
    """The Plan that the decoder of this name follows over a whole block, (B, T) for sequences (B,)."""
    T, first = model.config.block_size, None
    if name == 'wavefront':
        blank = torch.full((1, T), model.mask_id, device=device)
        first = HeadFiller.of(model).first(torch.ones_like(blank, dtype=torch.bool), model(blank))
    return make_plan(name, T, passes, seed, sequences, first, device=device)


def n_sequences(evaluation):
    """How many validation sequences are measured: fewer of a short text, for errors know nothing of what they share."""
    return evaluation.corpus.room('val', SEQUENCES, evaluation.model.config.block_size + 1)


@torch.no_grad()
def measure(evaluation, decoders, progress):
    """One entry for each decoder, after those of the bound and of the autoregressive baseline, on the same sequences.

    evaluation: evaluate.Evaluation, whose processes share the entries; all of them get all.
    """
    T, processes = evaluation.model.config.block_size, evaluation.processes
    rows = evaluation.corpus.spread_rows('val', n_sequences(evaluation), T + 1)
    rows = torch.from_numpy(rows).to(evaluation.device)
    todo = [('nelbo', 'random', T), *decoders]
    if T < evaluation.evaluator.config.block_size + 1:
        todo.insert(1, ('ar_baseline', 'left-to-right', T))
    lines = todo[processes.rank::processes.world]
    with autocast(evaluation.device, evaluation.dtype):
        bar = tqdm(lines, unit='decoder', disable=not progress)
        own = [measure_likelihood(evaluation, rows, *line) for line in bar]
        processes.barrier()    # nobody is timed while another still works on likelihoods
        measure_seconds(evaluation, own, progress)
    entries = [None] * len(todo)
    for rank, part in enumerate(processes.gathered(own)):
        entries[rank::processes.world] = part
    return compared(entries)


def compared(entries):
    """The entries with their mean difference from the baseline, in place of the nats of each sequence."""
    values = {e['decoder']: e['values'] for e in entries}.get('ar_baseline')
    for e in entries:
        own = e.pop('values')
        pairs = [a - b for a, b in zip(own, values)] if own and values and e['decoder'] != 'ar_baseline' else []
        e['minus_baseline'], e['minus_baseline_error'] = mean_error(pairs) if pairs else (None, None)
    return entries


def measure_likelihood(evaluation, rows, decoder, name, passes):
    """The entry of a decoder on rows (N, T + 1), as yet without seconds; values: nats per token of each.

    The baseline is given one token of the text before, for it cannot begin by itself. The bound has no values: each
    sequence has a number of masks of its own.
    """
    model, seed, x0, values = evaluation.model, evaluation.seed, rows[:, 1:].contiguous(), None
    if decoder == 'nelbo':
        bound = diffusion.validate(model, x0, BATCH, seed)
        nats, error = bound['nelbo'], bound['nelbo_error']
    elif decoder == 'ar_baseline':
        values = autoregressive.mean_nll(evaluation.evaluator, rows, BATCH)
    else:
        nll = []
        for start in range(0, len(rows), BATCH):
            sequences = range(start, min(start + BATCH, len(rows)))
            plan = plan_of(model, name, passes, seed, sequences, evaluation.device)
            own = x0[sequences.start:sequences.stop]
            nll.append(-log_likelihood(model, own, plan, use_sampler=decoder == 'sampler_head').mean(1))
        values = torch.cat(nll).tolist()
    if values:
        nats, error = mean_error(values)
    bits = bits_per_nat(evaluation.corpus.meta)
    return {'decoder': decoder, 'plan': name, 'passes': passes, 'passes_made': passes, 'waves': passes,
            'nats_per_token': nats, 'error': error, 'values': values, 'bits_per_character': nats * bits,
            'seconds': None, 'seconds_1': None}


class Sampling:
    """Draws n samples by the decoder of an entry, and keeps the Decoded: a row of timing.in_turn.

    first (n, 1): the tokens that the autoregressive baseline begins with.
    """

    def __init__(self, evaluation, first, entry):
        self.evaluation, self.first, self.decoded = evaluation, first, None
        self.is_baseline = entry['decoder'] == 'ar_baseline'
        self.config = decoding.DecoderConfig(use_sampler=entry['decoder'] == 'sampler_head', plan=entry['plan'],
                                             plan_passes=entry['passes'], mask_ratios=(), seed=evaluation.seed)

    def __call__(self, clock):
        model, n = self.evaluation.model, len(self.first)
        T, seed = model.config.block_size, self.evaluation.seed
        if self.is_baseline:
            autoregressive.generate(self.evaluation.evaluator, self.first, T + 1, range(n), seed)
        else:
            self.decoded = decoding.from_nothing(model, T, self.config, range(n))


def measure_seconds(evaluation, entries, progress):
    """What sampling by each entry takes: medians over rounds in which the decoders take turns; passes and steps."""
    first = torch.from_numpy(evaluation.corpus.spread_rows('val', BATCH, 1)).to(evaluation.device)
    samplings = {(i, key): Sampling(evaluation, first[:n], entry) for i, entry in enumerate(entries)
                 for key, n in (('seconds_1', 1), ('seconds', BATCH)) if entry['decoder'] != 'nelbo'}
    with tqdm(total=len(samplings) * (ROUNDS + 1), unit='batch', disable=not progress) as bar:
        rounds = in_turn(samplings, ROUNDS, evaluation.device, lambda _: bar.update())
    for (i, key), sampling in samplings.items():
        entries[i][key] = medians(rounds[i, key])['total']
        if key == 'seconds' and sampling.decoded:
            entries[i] |= {'passes_made': sampling.decoded.passes, 'waves': sampling.decoded.waves}


def table(entries):
    """Markdown, in the order of the entries."""
    rows = []
    for e in entries:
        passes = f'{e["passes_made"]} of {e["passes"]}' if e['passes_made'] < e['passes'] else e['passes']
        rows.append((NAMES[e['decoder']], e['plan'], passes, e['waves'],
                     value_text(e['nats_per_token'], e['error']),
                     value_text(e['minus_baseline'], e['minus_baseline_error'], sign='+'),
                     f'{e["bits_per_character"]:.3f}',
                     *('-' if e[key] is None else f'{e[key]:.2f}' for key in ('seconds_1', 'seconds'))))
    return markdown(COLUMNS, rows)


def plot(entries, corpus, path):
    """Bits per character over forward passes and over seconds: path without its ending, as .png and .svg."""
    from matplotlib.ticker import LogLocator, NullFormatter
    figure, axes = figures.pyplot().subplots(1, 2, figsize=(10, 4.8), sharey=True)
    styles = {'naive': dict(color='#b2502f', marker='s'), 'sampler_head': dict(color='#1f6f8b', marker='o')}
    lines = {'random': ':', 'interleaved': '--', 'speculative': '-', 'blocks': (0, (8, 2)), 'spans': '-.'}
    markers = {'left-to-right': '>', 'fronts-4': 'D', 'fronts-16': 'v', 'wavefront': '*'}    # of one pass
    for axis, key in zip(axes, ('passes_made', 'seconds')):
        for decoder, plan in dict.fromkeys((e['decoder'], e['plan']) for e in entries):
            points = [e for e in entries if (e['decoder'], e['plan']) == (decoder, plan)]
            if decoder in styles:
                style = styles[decoder] | ({'marker': markers[plan], 'ms': 7} if plan in markers else {'ms': 4})
                axis.plot([p[key] for p in points], [p['bits_per_character'] for p in points],
                          ls=lines.get(plan, ''), label=f'{NAMES[decoder]}, {plan}', **style)
            else:
                axis.axhline(points[0]['bits_per_character'], color='grey', lw=1,
                             ls='--' if decoder == 'nelbo' else '-', label=NAMES[decoder])
                if decoder != 'nelbo' and key == 'seconds':
                    axis.plot(points[0][key], points[0]['bits_per_character'], 'P', color='grey', ms=8)
        axis.set(xscale='log', xlabel='forward passes' if key == 'passes_made' else f'seconds for {BATCH} samples')
        ticks = dict(base=2) if key == 'passes_made' else dict(subs=(1, 2, 5))
        axis.xaxis.set_major_locator(LogLocator(**ticks, numticks=20))
        axis.xaxis.set_major_formatter('{x:g}')
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        name_what_is_above(axis, entries, key)
    axes[0].set_ylabel('bits per character')
    figure.suptitle(f'{corpus}: exact likelihood of decoders on validation text')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='lower center', ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figures.save(figure, path)


def name_what_is_above(axis, entries, key):
    """End the axis at HIGHEST times the lowest bits, and name at its edge what lies above: 'naive, 1 pass: 4.83'."""
    top = HIGHEST * min(e['bits_per_character'] for e in entries)
    axis.set_ylim(top=min(top, axis.get_ylim()[1]))
    above = {f'\u2191 {NAMES[e["decoder"]]}, {e["passes"]} pass{"es" * (e["passes"] > 1)}: '
             f'{e["bits_per_character"]:.2f}': e[key] for e in entries if e['bits_per_character'] > top and e[key]}
    for number, (text, x) in enumerate(above.items()):    # in one pass every plan of naive decoding is the same
        axis.annotate(text, (x, top), xytext=(0, -12 * (number + 1)), textcoords='offset points', fontsize=8,
                      bbox=dict(facecolor='white', edgecolor='none', pad=1), annotation_clip=False)


def write(evaluation, passes, plans, out_dir, progress, identity, overwrite):
    """Measure, print the table, write likelihood.json and the figure to out_dir: the first process does for all.

    InputError, before anything is measured, where it holds those of another identity and may not overwrite them.
    """
    path, processes = os.path.join(out_dir, 'likelihood'), evaluation.processes
    length = evaluation.model.config.block_size
    decoders = list_decoders(evaluation.model, [n for n in passes if n <= length], plans)

    def prepare():
        make_folder(out_dir)
        if os.path.lexists(f'{path}.json') and not overwrite:
            require_file(f'{path}.json', 'results that evaluate.py wrote, or nothing')
            results.require_identity(f'{path}_identity.json', identity)
    processes.of_first(prepare)
    if too_many := [n for n in passes if n > length]:
        print(f'left out: {joined(too_many)} passes, for a sequence has {length} tokens')
    entries = measure(evaluation, decoders, progress)
    if not processes.master_process:
        return
    print(table(entries))
    print(f'\n{n_sequences(evaluation)} validation sequences of {length} tokens, {evaluation.dtype} on '
          f'{evaluation.device}; seconds at temperature 1, by turns')
    with suppress(FileNotFoundError):    # never beside the identity of another
        os.remove(f'{path}.json')
    write_atomically(f'{path}_identity.json', json.dumps({'identity': identity}, indent=1).encode())
    write_atomically(f'{path}.json', json.dumps(entries, indent=1).encode())
    plot(entries, evaluation.corpus.meta['name'], path)
    print(f'saved {path}.json, {path}.png and {path}.svg')
