"""Measures what the samples of each decoder are worth: evaluation.json, and a report with a table and two figures.

    python evaluate.py --checkpoint out-char-diffusion/ckpt.pt --evaluator out-char-ar/ckpt.pt --quick
    python evaluate.py --judge out-char-diffusion/judge_model.pt --out-dir out-evaluation

Every decoder writes the same number of samples with several numbers of forward passes, schedules, strengths of noise
and temperatures. Two evaluators that share no weights score them: a causal model and a Kneser-Ney n-gram model. The
causal model writes samples too, as the baseline. report.py compares decoders at real text's diversity. What is measured
is kept in evaluation.json: an interrupted run goes on where it was, and later runs add to it.
"""
import environment    # before torch

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

import autoregressive
import decoding
import diffusion
import likelihood_table
import report
import signals
from checkpoint import load_model, require_generator, require_same_vocabulary
from corpus import DATA_DIR, Corpus
from decoding import DecoderConfig, linear_ratios
from device import DTYPES, autocast, pick_device, pick_dtype
from errors import InputError, run
from files import make_folder, write_atomically
from judge import Judge
from metrics import Reference, describe
from ngram import NGram
from plans import ANY_PASSES
from settings import SEEDS, Range, check_range
from timing import synchronize

BATCH = 32    # samples decoded at a time
EVAL_SEQUENCES = 432    # validation sequences of the likelihood bound, as in train.py
# what decides the results besides the files; report.py only presents them
SOURCES = ('autoregressive', 'blocks', 'cache', 'critic', 'decoding', 'diffusion', 'evaluate', 'filling', 'judge',
           'layers', 'metrics', 'model', 'ngram', 'noise', 'plans', 'sampler')


# -----------------------------------------------------------------------------
# what is measured

@dataclass(frozen=True)
class Recipe:
    """A decoder and the choices it is given: each gets its best schedule, noise and temperature."""
    config: dict                      # fields of DecoderConfig
    fewest: int = 2                   # forward passes: with one, several decoders are the same
    most: int = 64                    # forward passes, unless more are asked for
    schedules: tuple = ('even',)      # or plans; the one known to be best first, which is the one of --quick
    noises: tuple = (0.0,)            # strengths of the noise on the order, likewise


RECIPES = {
    # without the sampler head
    'naive-random': Recipe(dict(use_sampler=False, order='random'), fewest=1),             # ancestral, MDLM's
    'naive-confidence': Recipe(dict(use_sampler=False, order='confidence', revise=False),  # MaskGIT's
                               schedules=('cosine', '0.95-0.05'), noises=(6.0, 2.0)),
    'naive-remask': Recipe(dict(use_sampler=False, order='confidence', revise=True),       # as ReMDM: kept ones compete
                           schedules=('0.4-0.01', '0.95-0.05'), noises=(2.0, 6.0)),
    'naive-planned': Recipe(dict(use_sampler=False), schedules=('interleaved',)),
    # with it
    'wavefront': Recipe(dict(order='confidence'), 1, 16, ('0.7-0.05',), (2.0,)),
    'wavefront-planned': Recipe({}, 2, 16, ('interleaved', 'blocks', 'spans')),
    'left-to-right': Recipe(dict(plan='left-to-right', order='critic'), 1, 16, ('0.7-0.05',), (2.0, 4.0, 0.0)),
    'wavefront-critic': Recipe(dict(order='critic'), 2, 16, ('0.7-0.05',), (2.0, 4.0, 0.0)),
    'wavefront-corrected': Recipe(dict(order='critic', corrections=8), 1, 16, ('0.7-0.1',), (2.0,)),
}
BASELINE = 'ar_baseline'    # the evaluator's own samples; a forward pass for each token
PASSES = (1, 4, 8, 16, 64)
TEMPERATURES = (0.7, 0.85, 1.0, 1.2, 1.4)
QUICK = {'decoders': ('naive-planned', 'naive-remask', 'left-to-right', 'wavefront-critic'), 'passes': (1, 4, 16),
         'temperatures': (0.8, 1.0, 1.2)}


@dataclass(frozen=True)
class Setting:
    decoder: str           # a name in RECIPES, or BASELINE
    passes: int
    schedule: str
    noise: float
    temperature: float

    @property
    def curve(self):
        """Name of the curve over temperature that this setting lies on."""
        noise = f', noise {self.noise:g}' if self.noise else ''
        return f'{self.decoder}, {self.passes} passes' + (f', {self.schedule}{noise}' if self.schedule else '')

    @property
    def key(self):
        return f'{self.curve}, temperature {self.temperature:g}'

    def decoder_config(self, seed):
        if self.schedule in ANY_PASSES:
            passes = dict(plan=self.schedule, plan_passes=self.passes, mask_ratios=())
        else:
            passes = dict(mask_ratios=tuple(mask_ratios(self.schedule, self.passes)))
        return DecoderConfig(temperature=self.temperature, randomness_strength=self.noise, seed=seed, **passes,
                             **RECIPES[self.decoder].config)


def mask_ratios(schedule, passes):
    """Share remasked after each pass but the last.

    'even' fills as many positions in each pass, 'cosine' is MaskGIT's, '0.7-0.1' falls linearly from one to the other.
    """
    if schedule == 'even':
        return [1 - (i + 1) / passes for i in range(passes - 1)]
    if schedule == 'cosine':
        return [math.cos(math.pi / 2 * (i + 1) / passes) for i in range(passes - 1)]
    start, end = map(float, schedule.split('-'))
    return linear_ratios(passes, start, end)


def list_settings(decoders, passes, temperatures, length, quick=False):
    """Every setting that differs from the others in what it does, the baseline's first.

    passes: () for those of PASSES that a recipe wants. InputError if that leaves a decoder without any.
    """
    curves = [(BASELINE, length - 1, '', 0.0)]
    for name in decoders:
        recipe = RECIPES[name]
        chosen = [n for n in passes or PASSES if recipe.fewest <= n and (passes or n <= recipe.most)]
        if not chosen:
            raise InputError(f'--passes {joined(passes)} leaves {name} nothing to do, wanted {recipe.fewest} or more')
        for n in chosen:
            schedules, noises = (recipe.schedules, recipe.noises) if n > 1 else (('even',), (0.0,))
            first = 1 if quick else None
            curves += [(name, n, schedule, noise) for schedule in schedules[:first] for noise in noises[:first]]
    return [Setting(*curve, temperature) for curve in curves for temperature in temperatures]


# -----------------------------------------------------------------------------
# measuring

class Evaluation:
    """The models, the real text and what was measured so far."""

    def __init__(self, args):
        self.device = pick_device(args.device)
        self.dtype = pick_dtype(args.dtype, self.device)
        self.seed, self.n = args.seed, args.num_samples
        self.load_models(args)
        self.length = min(self.model.config.block_size, self.evaluator.config.block_size + 1)
        self.corpus.check(max(self.length, self.model.config.block_size))

    def open(self, args):
        """The results so far, the real text that samples are compared with, and the n-gram evaluator."""
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
        self.evaluator, _, other = load_model(args.evaluator, 'char_ar')
        config = self.evaluator.config
        if (config.attention_type, config.model_mode) != ('causal', 'language_model'):
            raise InputError(f'the evaluator {args.evaluator!r} is not causal; '
                             f'python train.py config/train_char_ar.py trains one')
        require_same_vocabulary(other['corpus'], args.evaluator, saved['corpus'])
        self.judge = None
        if args.judge:
            model, _, other = load_model(args.judge, 'judge')
            require_same_vocabulary(other['corpus'], args.judge, saved['corpus'])
            self.judge = Judge(model.to(self.device), args.judge, other['corpus'])
        self.corpus = Corpus(saved['corpus']['name'], args.data_dir)
        require_same_vocabulary(saved['corpus'], args.checkpoint, self.corpus.meta)
        weights = torch.float64 if self.dtype == 'float64' else torch.float32
        self.model, self.evaluator = (model.to(self.device, weights) for model in (self.model, self.evaluator))

    def open_results(self, args):
        """Results of the same identity go on; InputError for those of another, unless they are to be overwritten."""
        self.path = os.path.join(args.out_dir, 'evaluation.json')
        hardware = f'{platform.machine()}, {os.cpu_count()} cores'
        if self.device.startswith('cuda'):
            hardware = torch.cuda.get_device_name(self.device)
        identity = {'checkpoint': digest(args.checkpoint), 'evaluator': digest(args.evaluator),
                    'judge': digest(args.judge) if args.judge else 'none', 'corpus': self.corpus.meta['sha256'],
                    'code': code_version(), 'seed': self.seed, 'num_samples': self.n, 'length': self.length,
                    'device': self.device, 'dtype': self.dtype, 'hardware': hardware, 'torch': torch.__version__}
        self.result = {'identity': identity, 'reference': {}, 'settings': {}}
        make_folder(args.out_dir)
        if os.path.exists(self.path) and not args.overwrite:
            self.result = same_identity(self.path, identity)
        self.result |= {'command': shlex.join(['python', *sys.argv]), 'checkpoint': args.checkpoint,
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
        sequences = self.corpus.spread_rows('val', EVAL_SEQUENCES, self.model.config.block_size)
        with autocast(self.device, self.dtype):
            bound = diffusion.validate(self.model, torch.from_numpy(sequences).to(self.device), 64, self.seed)
        bits = 1 / math.log(2) / self.corpus.chars_per_token
        bound |= {'bits_per_character': bound['nelbo'] * bits, 'bits_error': bound['nelbo_error'] * bits}
        self.result['validation'] = bound
        self.save()

    def decode(self, setting, sequences):
        """Samples with these numbers, (B, T) ids, and the seconds they took."""
        B = len(sequences)
        synchronize(self.device)
        start = time.perf_counter()
        with autocast(self.device, self.dtype):
            if setting.decoder == BASELINE:
                first = self.real[list(sequences), :1]
                x = autoregressive.generate(self.evaluator, first, self.length, sequences, self.seed,
                                            setting.temperature)
            else:
                x = torch.full((B, self.length), self.tokenizer.mask_id, device=self.device)
                free = torch.ones_like(x, dtype=torch.bool)
                x = decoding.generate(self.model, x, free, setting.decoder_config(self.seed), sequences).x
        synchronize(self.device)
        return x, time.perf_counter() - start

    def run(self, settings, progress, stop):
        """Measure the settings that are not measured yet, and keep each as soon as it is; end where stop says so."""
        todo = [setting for setting in settings if setting.key not in self.result['settings']]
        bar = tqdm(todo, unit='setting', disable=not progress)
        for decoder in dict.fromkeys(setting.decoder for setting in todo):    # the first call of a kind is slow
            self.decode(next(s for s in todo if s.decoder == decoder), range(1))
        for setting in bar:
            if stop.number:
                print(f'{signals.name_of(stop.number)}: what is measured is kept, the same command goes on with it')
                sys.exit(128 + stop.number)
            bar.set_description(setting.key)
            batches = [range(i, min(i + self.batch, self.n)) for i in range(0, self.n, self.batch)]
            decoded = [self.decode(setting, sequences) for sequences in batches]
            x = torch.cat([x for x, _ in decoded])
            self.result['settings'][setting.key] = asdict(setting) | {
                'curve': setting.curve, 'seconds_batch': decoded[0][1], 'seconds_1': self.decode(setting, range(1))[1],
                'measures': self.measure(x), 'example': self.tokenizer.decode(x[0].tolist())}
            self.save()


def digest(path):
    with open(path, 'rb') as f:
        return hashlib.sha256(f.read()).hexdigest()[:16]


def code_version():
    """Digest of the source files that decide what is measured."""
    here = os.path.dirname(os.path.abspath(__file__))
    joined = ''.join(digest(os.path.join(here, f'{name}.py')) for name in SOURCES)
    return hashlib.sha256(joined.encode()).hexdigest()[:16]


def same_identity(path, identity):
    """The results at path. InputError names what they were measured with, where that is not this identity."""
    try:
        with open(path) as f:
            result = json.load(f)
        before = dict(result['identity'])
        whole = all({'curve', 'measures', 'temperature'} <= set(entry) for entry in result['settings'].values())
        if not whole or not isinstance(result['reference'], dict):
            raise ValueError('damaged')
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f'{path!r} cannot be read as results; give another --out-dir, or --overwrite') from error
    differing = [f'{name} {before.get(name)}, now {now}' for name, now in identity.items() if before.get(name) != now]
    if differing:
        raise InputError(f'{path!r} holds results of another identity ({"; ".join(differing)}); '
                         f'give another --out-dir, or --overwrite to replace them')
    return result


# -----------------------------------------------------------------------------
# command line

def parser():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    add = parser.add_argument
    add('--checkpoint', default='out-char-diffusion/ckpt.pt', help='the masked-diffusion model (default: %(default)s)')
    add('--evaluator', default='out-char-ar/ckpt.pt',
        help='the causal model that scores samples and is the baseline (default: %(default)s)')
    add('--judge', default='', help='a judge, for one more column')
    add('--out-dir', default='out-evaluation', help='where evaluation.json and the figures go (default: %(default)s)')
    add('--likelihood', action='store_true', help='the exact likelihood of decoders that follow a plan, not samples')
    add('--overwrite', action='store_true', help='replace results of other models, seeds or code in --out-dir')
    add('--quick', action='store_true', help='fewer settings: about three minutes with a small model on two cores')
    add('--decoders', default='', help=f'some of {",".join(RECIPES)} (default: all that the model has heads for)')
    add('--passes', default='', help=f'numbers of forward passes (default: {joined(PASSES)})')
    add('--temperatures', default='', help=f'points of each curve (default: {joined(TEMPERATURES)})')
    add('--num-samples', type=int, default=32, help='samples of each setting (default: %(default)s)')
    add('--data-dir', default=DATA_DIR, help='where corpora are kept (default: data/ beside this file)')
    add('--seed', type=int, default=1337, help='of the noise (default: %(default)s)')
    add('--device', default='auto', help='auto, cuda, mps, cpu (default: %(default)s)')
    add('--dtype', default='auto', choices=('auto', *DTYPES), help='precision (default: %(default)s)')
    add('--no-progress', action='store_true', help='no bar')
    return parser


def arguments():
    args = parser().parse_args()
    chosen = QUICK if args.quick else {'decoders': tuple(RECIPES), 'passes': (), 'temperatures': TEMPERATURES}
    args.named = bool(args.decoders)
    args.decoders = names(args.decoders) or chosen['decoders']
    args.passes = numbers(args.passes, int, 'passes') or chosen['passes']
    args.temperatures = numbers(args.temperatures, float, 'temperatures') or chosen['temperatures']
    check_range(f'--num-samples is {args.num_samples}', args.num_samples, Range(2, 2 ** 20))
    check_range(f'--seed is {args.seed}', args.seed, SEEDS)
    for value in args.passes:
        check_range(f'--passes has {value}', value, Range(1, 10 ** 5))
    return args


def joined(values):
    return ','.join(f'{value:g}' for value in values)


def names(text):
    """'a,b' -> ('a', 'b'). InputError for an unknown decoder."""
    found = tuple(dict.fromkeys(text.split(','))) if text else ()
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


def main():
    args = arguments()
    evaluation = Evaluation(args)
    progress = not args.no_progress and sys.stderr.isatty()
    if args.likelihood:
        likelihood_table.write(evaluation, args.passes or likelihood_table.PASSES, args.out_dir, progress)
        return
    evaluation.open(args)
    decoders = usable_decoders(args, evaluation.model)
    settings = list_settings(decoders, args.passes, args.temperatures, evaluation.length, args.quick)
    evaluation.measure_reference()
    with signals.noted('this setting') as stop:
        evaluation.run(settings, progress, stop)
    report.write(evaluation.result, [setting.key for setting in settings], args.out_dir)


if __name__ == '__main__':
    run(main)
