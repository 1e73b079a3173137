"""Measures what each decoder is worth: by its samples, by its exact likelihood, and in gaps of real text.

    python evaluate.py --checkpoint out-char-diffusion/ckpt.pt --evaluator out-char-ar/ckpt.pt --quick
    python evaluate.py --judge out-char-diffusion/judge_model.pt --out-dir out-evaluation
    python evaluate.py --gaps --checkpoint out-char-diffusion/ckpt.pt
    torchrun --standalone --nproc_per_node=4 evaluate.py --likelihood

By samples: every decoder writes the same number of them with several numbers of forward passes, schedules, strengths of
noise and temperatures. Two evaluators that share no weights score them: a causal model and a Kneser-Ney n-gram model.
The causal model writes samples too, as the baseline. report.py compares decoders at real text's diversity. What is
measured is kept in evaluation.json: an interrupted run goes on where it was, and later runs add to it. Several
processes share the settings; each is measured by one of them, and the first alone prints and writes.

By likelihood: likelihood_table.py, whose lines several processes share. In gaps: gap_table.py, in the first one alone.
"""
import environment    # before torch

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict

import torch
from tqdm import tqdm

import autoregressive
import decoding
import diffusion
import gap_table
import likelihood_table
import report
import results
import signals
from checkpoint import load_model, require_generator, require_same_vocabulary, untrained_heads
from corpus import DATA_DIR, Corpus, bits_per_nat
from device import DTYPES, autocast, pick_device, pick_dtype
from distributed import Processes, leave
from errors import InputError, run
from files import make_folder, write_atomically
from judge import Judge
from metrics import LONG, Reference, describe
from ngram import NGram
from recipes import BASELINE, PASSES, QUICK, RECIPES, TEMPERATURES, joined, list_settings
from settings import SEEDS, Range, check_not_empty, check_range
from timing import synchronize

EVALUATOR = 'out-char-ar/ckpt.pt'
BATCH = 32    # samples decoded at a time


# -----------------------------------------------------------------------------
# measuring

class Evaluation:
    """The models, the real text and what was measured so far."""

    def __init__(self, args, processes):
        self.processes, self.device = processes, processes.device
        self.dtype = processes.of_first(lambda: pick_dtype(args.dtype, self.device))
        self.seed, self.n = args.seed, args.num_samples
        self.load_models(args)
        self.length = self.model.config.block_size
        if self.evaluator is not None:
            self.length = min(self.length, self.evaluator.config.block_size + 1)
        self.corpus.check(max(self.length, self.model.config.block_size))

    def open(self, args):
        """The results so far, the real text that samples are compared with, and the n-gram evaluator."""
        if self.length < LONG:
            raise InputError(f'samples of {self.length} tokens are too short to tell their diversity; wanted models of '
                             f'block_size {LONG} or more, or --likelihood')
        self.open_results(args)
        # real text, and as much again for it to be compared with
        both = self.corpus.spread_rows('val', 2 * self.n, self.length)
        self.real = torch.from_numpy(both[::2].copy()).to(self.device)
        train = self.tokenizer.decode(self.corpus.splits['train'].tolist())
        self.reference = Reference.of(train, [self.tokenizer.decode(ids) for ids in both[1::2].tolist()])
        self.ngram = NGram(train)

    def load_models(self, args):
        """The generator, the evaluator, the judge if there is one, and their corpus. InputError if they do not fit."""
        self.model, self.tokenizer, saved = load_model(args.checkpoint)
        require_generator(self.model, args.checkpoint)
        for head in untrained_heads(saved):
            print(f'note: the {head} head had not begun to learn when {args.checkpoint} was saved, and is left out')
        self.evaluator = None
        if not args.gaps:
            self.evaluator, _, other = load_model(args.evaluator, 'char_ar')
            config = self.evaluator.config
            if (config.attention_type, config.model_mode) != ('causal', 'language_model'):
                raise InputError(f'the evaluator {args.evaluator!r} is not causal; '
                                 f'python train.py config/train_char_ar.py trains one')
            require_same_vocabulary(other['corpus'], args.evaluator, saved['corpus'])
        self.judge = None
        if args.judge:
            self.judge = Judge.load(args.judge, saved['corpus'], self.device)
        self.corpus = Corpus(saved['corpus']['name'], args.data_dir)
        require_same_vocabulary(saved['corpus'], args.checkpoint, self.corpus.meta)
        weights = torch.float64 if self.dtype == 'float64' else torch.float32
        for model in filter(None, (self.model, self.evaluator)):
            model.to(self.device, weights).requires_grad_(False)    # so that tables of weights are made once

    def identity(self, args):
        """What results depend on: those of another identity do not compare."""
        hardware = f'{platform.machine()}, {os.cpu_count()} cores'
        if self.device.startswith('cuda'):
            hardware = torch.cuda.get_device_name(self.device)
        digest = results.digest
        return {'checkpoint': digest(args.checkpoint),
                'evaluator': digest(args.evaluator) if self.evaluator is not None else 'none',
                'judge': digest(args.judge) if args.judge else 'none', 'corpus': self.corpus.meta['sha256'],
                'code': results.code_version(), 'seed': self.seed, 'num_samples': self.n, 'length': self.length,
                'device': self.device.split(':')[0], 'dtype': self.dtype, 'hardware': hardware,
                'torch': torch.__version__}

    def open_results(self, args):
        """Results of the same identity go on; InputError for those of another, unless they are to be overwritten.

        The first process reads them for all.
        """
        self.path = os.path.join(args.out_dir, 'evaluation.json')
        identity = self.identity(args)

        def read():
            make_folder(args.out_dir)
            found = None if args.overwrite else results.read(self.path, identity, results.check_evaluation)
            return found or {'identity': identity, 'reference': {}, 'settings': {}}
        self.result = self.processes.of_first(read) | {
            'command': shlex.join(['python', *sys.argv]), 'checkpoint': args.checkpoint,
            'corpus': self.corpus.meta['name'], 'batch': self.batch}

    @property
    def batch(self):
        return min(BATCH, self.n)

    def save(self):
        write_atomically(self.path, json.dumps(self.result).encode())

    def measure(self, x):
        """Every measure of samples x (N, T) ids, as metrics.describe gives them."""
        texts = [self.tokenizer.decode(ids) for ids in x.tolist()]
        with autocast(self.device, self.dtype), torch.no_grad():
            nll = [autoregressive.nll(self.evaluator, self.evaluator, part).mean(1) for part in x.split(64)]
            scores = {'nll': torch.cat(nll).tolist(), 'nll_ngram': [self.ngram.nll(text) for text in texts]}
            if self.judge:
                scores['judge'] = torch.cat([self.judge.score(part) for part in x.split(64)]).tolist()
        return describe(texts, scores, self.reference)

    def measure_reference(self):
        """Real validation text, and the checkpoint's likelihood bound."""
        if 'validation' in self.result:
            return
        self.result['reference']['real text'] = self.measure(self.real)
        n = likelihood_table.n_sequences(self)
        sequences = self.corpus.spread_rows('val', n, self.model.config.block_size)
        with autocast(self.device, self.dtype):
            bound = diffusion.validate(self.model, torch.from_numpy(sequences).to(self.device), 64, self.seed)
        bits = bits_per_nat(self.corpus.meta)
        bound |= {'bits_per_character': bound['nelbo'] * bits, 'bits_error': bound['nelbo_error'] * bits}
        self.result['validation'] = bound
        self.save()

    def decode(self, setting, sequences):
        """Samples with these numbers, (B, T) ids, and the seconds they took."""
        synchronize(self.device)
        start = time.perf_counter()
        with autocast(self.device, self.dtype):
            if setting.decoder == BASELINE:
                first = self.real[list(sequences), :1]
                x = autoregressive.generate(self.evaluator, first, self.length, sequences, self.seed,
                                            setting.temperature)
            else:
                x = decoding.from_nothing(self.model, self.length, setting.decoder_config(self.seed), sequences).x
        synchronize(self.device)
        return x, time.perf_counter() - start

    def measure_setting(self, setting):
        """The entry of evaluation.json for a setting."""
        batches = [range(i, min(i + self.batch, self.n)) for i in range(0, self.n, self.batch)]
        decoded = [self.decode(setting, sequences) for sequences in batches]
        x = torch.cat([x for x, _ in decoded])
        return asdict(setting) | {
            'curve': setting.curve, 'seconds_batch': decoded[0][1], 'seconds_1': self.decode(setting, range(1))[1],
            'measures': self.measure(x), 'example': self.tokenizer.decode(x[0].tolist())}

    def run(self, settings, progress, stop):
        """Measure the settings that are not measured yet, one in each process at a time, and keep what is measured.

        Returns the number of the signal that ended it early, as stop has it, else 0.
        """
        rank, world, ended_by = self.processes.rank, self.processes.world, 0
        todo = [setting for setting in settings if setting.key not in self.result['settings']]
        own = todo[rank::world]
        for decoder in dict.fromkeys(setting.decoder for setting in own):    # the first call of a kind is slow
            self.decode(next(s for s in own if s.decoder == decoder), range(1))
        with tqdm(todo, unit='setting', disable=not progress) as bar:
            for start in range(0, len(todo), world):
                if ended_by:
                    print(f'{signals.name_of(ended_by)}: what is measured is kept, the same command goes on with it')
                    return ended_by
                at_once = todo[start:start + world]
                bar.set_description(at_once[0].key)
                entry = self.measure_setting(at_once[rank]) if rank < len(at_once) else None
                entries, numbers = zip(*self.processes.gathered((entry, stop.number)))
                self.result['settings'] |= {setting.key: entry for setting, entry in zip(at_once, entries)}
                ended_by = max(numbers)
                if self.processes.master_process:
                    self.save()
                bar.update(len(at_once))
        return 0


# -----------------------------------------------------------------------------
# command line

def parser():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    add = parser.add_argument
    add('--checkpoint', default='out-char-diffusion/ckpt.pt', help='the masked-diffusion model (default: %(default)s)')
    add('--evaluator', help=f'the causal model that scores samples and is the baseline (default: {EVALUATOR})')
    add('--judge', help='a judge, for one more column')
    add('--out-dir', default='out-evaluation', help='where evaluation.json and the figures go (default: %(default)s)')
    add('--likelihood', action='store_true', help='the exact likelihood of decoders that follow a plan, not samples')
    add('--gaps', action='store_true', help='what the model makes of gaps in real text; needs no evaluator')
    add('--overwrite', action='store_true', help='replace results of other models, seeds or code in --out-dir')
    add('--quick', action='store_true', help='fewer settings: about three minutes with a small model on two cores')
    add('--decoders', help=f'some of {",".join(RECIPES)} (default: all that the model has heads for)')
    add('--passes', help=f'numbers of forward passes (default: those of {joined(PASSES)} that a decoder '
        f'takes; {joined(likelihood_table.PASSES)} with --likelihood)')
    add('--plans', help='of --likelihood, such as interleaved,speculative (default: all)')
    add('--temperatures', help=f'points of each curve (default: {joined(TEMPERATURES)})')
    add('--num-samples', type=int, help='samples of each setting (default: 32)')
    add('--data-dir', default=DATA_DIR, help='where corpora are kept (default: data/ beside this file)')
    add('--seed', type=int, default=1337, help='of the noise (default: %(default)s)')
    add('--device', default='auto', help='auto, cuda, mps, cpu (default: %(default)s)')
    add('--dtype', default='auto', choices=('auto', *DTYPES), help='precision (default: %(default)s)')
    add('--no-progress', action='store_true', help='no bar')
    return parser


def arguments():
    args = parser().parse_args()
    check_not_empty(args)
    chosen = QUICK if args.quick else {'decoders': tuple(RECIPES), 'passes': (), 'temperatures': TEMPERATURES}
    tables = [f'--{name}' for name in ('likelihood', 'gaps') if getattr(args, name)]
    ignored = [name for name in ('judge', 'decoders', 'temperatures', 'num_samples') if getattr(args, name)]
    not_of_gaps = ('evaluator', 'likelihood', 'passes', 'plans', 'quick')
    ignored += [name for name in not_of_gaps if args.gaps and getattr(args, name)]
    if tables and ignored:
        raise InputError(f'{tables[-1]} goes without --{ignored[0].replace("_", "-")}; wanted one of the two')
    if args.plans and not args.likelihood:
        raise InputError('--plans goes with --likelihood; wanted that, or --decoders in place of --plans')
    args.evaluator = args.evaluator or EVALUATOR
    args.plans = tuple(sorted({plan.strip() for plan in (args.plans or '').split(',')} - {''}))
    args.num_samples = 32 if args.num_samples is None else args.num_samples
    args.named = bool(args.decoders)
    args.decoders = names(args.decoders) or chosen['decoders']
    args.passes = numbers(args.passes, int, 'passes') or chosen['passes']
    args.temperatures = numbers(args.temperatures, float, 'temperatures') or chosen['temperatures']
    check_range(f'--num-samples is {args.num_samples}', args.num_samples, Range(2, 2 ** 20))
    check_range(f'--seed is {args.seed}', args.seed, SEEDS)
    for value in args.passes:
        check_range(f'--passes has {value}', value, Range(1, 10 ** 5))
    return args


def names(text):
    """'a,b' -> ('a', 'b'). InputError for an unknown decoder."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(','))) if text else ()
    unknown = [name for name in found if name not in RECIPES]
    if unknown:
        raise InputError(f'--decoders has {unknown[0]}, wanted some of {", ".join(RECIPES)}')
    return found


def numbers(text, kind, flag):
    """'1,2' -> (1, 2), in order. InputError for what is no number above 0."""
    try:
        values = tuple(sorted({kind(part) for part in text.split(',')})) if text else ()
    except ValueError:
        raise InputError(f'--{flag} is {text!r}, wanted numbers such as 1,4,16') from None
    if not all(0 < value < math.inf for value in values):
        raise InputError(f'--{flag} is {text!r}, wanted numbers above 0')
    return values


def usable_decoders(args, model):
    """The decoders that the model has heads for. InputError if one was asked for that it has no head for."""
    def lacks(name):
        config = RECIPES[name].config
        if config.get('use_sampler', True) and model.sampler_head is None:
            return 'sampler'
        return 'critic' if config.get('order') == 'critic' and model.critic_head is None else ''
    for name in args.decoders:
        if args.named and lacks(name):
            raise InputError(f'{args.checkpoint!r} has no {lacks(name)} head, which --decoders {name} needs')
    return [name for name in args.decoders if not lacks(name)]


def evaluate(args, processes):
    """Measure what the flags ask for and write it; several processes share the work.

    Returns the number of the signal that ended it early, else 0.
    """
    evaluation = Evaluation(args, processes)
    progress = not args.no_progress and sys.stderr.isatty() and processes.master_process
    if args.likelihood:
        passes = args.passes or likelihood_table.PASSES
        identity = evaluation.identity(args) | {'passes': list(passes), 'plans': list(args.plans)}
        likelihood_table.write(evaluation, passes, args.plans, args.out_dir, progress, identity, args.overwrite)
        return 0
    if args.gaps:
        if processes.master_process:
            gap_table.write(evaluation, args.out_dir, progress, evaluation.identity(args), args.overwrite)
        return 0
    evaluation.open(args)
    decoders = usable_decoders(args, evaluation.model)
    settings = list_settings(decoders, args.passes, args.temperatures, evaluation.length, args.quick, args.named)
    idle = [name for name in decoders if name not in {setting.decoder for setting in settings}]
    if idle:
        print(f'left out: {", ".join(idle)}, to which --passes {joined(args.passes)} leaves nothing to do')
    if processes.master_process:
        evaluation.measure_reference()
    with signals.noted('this setting') as stop:
        ended_by = evaluation.run(settings, progress, stop)
    if processes.master_process and not ended_by:
        report.write(evaluation.result, [setting.key for setting in settings], args.out_dir)
    return ended_by


def main():
    args = arguments()
    with Processes(pick_device(args.device)) as processes, processes.first_speaks():
        ended_by = evaluate(args, processes)
    leave(128 + ended_by if ended_by else 0)


if __name__ == '__main__':
    run(main)
