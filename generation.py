"""Generating text as the flags of sample_simple.py ask: given text, decoding, scores, what is shown and saved."""
import json
import math
import os
import secrets
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from tqdm import tqdm

import memory
import signals
from animate import PLACEHOLDER, Animation
from checkpoint import load_model, require_generator, untrained_heads
from choices import ANY_PASSES
from decoding import default_config, default_ratios, generate, linear_ratios, windows
from device import autocast, pick_dtype
from distributed import share_of
from errors import InputError, WriteError
from files import write_atomically
from judge import Judge
from plans import check_plan, fills_from_left, reads_blockwise
from progress import passes_text
from prompts import given_text, is_prefix

SCHEMA = 2    # of the file that --save writes
SHIPPED = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'pretrained', 'tiny_shakespeare.pt')


def checkpoint_path(args):
    """The checkpoint that the flags name; the shipped model while there is none that the defaults name."""
    path = os.path.join(args.out_dir, args.checkpoint_name)
    if path == os.path.join('out-char-diffusion', 'ckpt.pt') and not os.path.exists(path) and os.path.isfile(SHIPPED):
        print(f'no {path} yet: this is the shipped model; '
              f'python train.py config/train_char_diffusion_sampler.py trains your own')
        return SHIPPED
    return path


def decoder_config(args, model, path, prefix_only=True):
    """The DecoderConfig that the flags ask for: the defaults, changed by each flag that was given.

    prefix_only: no text is given but at the front, see prompts.is_prefix.
    """
    if args.order == 'critic' and model.critic_head is None:
        raise InputError(f'{path!r} has no critic head that has learned, which --order critic needs')
    if args.corrections and model.sampler_head is None:
        raise InputError(f'{path!r} has no sampler head that has learned, which --corrections needs')
    use_sampler = False if args.disable_sampler else None
    given = {name: getattr(args, name) for name in ('order', 'plan') if getattr(args, name)}
    if (args.plan_passes or 1) > 1 and prefix_only:    # the default plans for revising take one pass
        with_head = model.sampler_head is not None and not args.disable_sampler
        given.setdefault('plan', 'blocks' if with_head and model.reads_text else 'interleaved')
    revising = is_about_revising(args) or args.plan_passes is not None
    config = default_config(model, args.iterations, use_sampler, prefix_only, revising,
                            seed=args.seed, top_p=args.top_p, temperature=args.temperature,
                            end_temperature=args.end_temperature, revise=not args.no_revise,
                            randomness_strength=args.randomness_strength, remask_kept=args.remask_kept,
                            corrections=args.corrections, correction_ratio=args.correction_ratio,
                            threshold=args.threshold or 0.0, **given)
    config.plan_passes = args.plan_passes or (args.iterations if config.plan in ANY_PASSES else 1)
    check_plan(config.plan, config.plan_passes)
    if fills_from_left(config.plan) and args.seed_text and args.seed_placement == 'random':
        raise InputError(f'--plan {config.plan} needs the same positions in every sample; found --seed-placement '
                         f'random; wanted --plan wavefront, interleaved, spans or random')
    if config.plan == 'speculative':
        require_speculative(args, config)
    revisions = args.iterations - config.plan_passes
    if revisions < 0:
        raise InputError(f'--plan-passes is {config.plan_passes}, wanted at most --iterations, {args.iterations}')
    require_revisions(args, config, revisions)
    if args.masking_ratios is not None:
        if len(args.masking_ratios) != revisions:
            raise InputError(f'--plan {config.plan} leaves {revisions} iterations to revise, found '
                             f'{len(args.masking_ratios)} --masking-ratios')
        config.mask_ratios = tuple(args.masking_ratios)
    elif revisions:
        start, end = (default if given is None else given for default, given in zip(
            default_ratios(args.iterations), (args.start_ratio, args.end_ratio)))
        config.mask_ratios = tuple(linear_ratios(revisions + 1, start, end))
    else:
        config.mask_ratios = ()
    return config


def require_revisions(args, config, revisions):
    """InputError for a flag to which so many iterations that revise leave nothing to do."""
    saves_scores = args.plan_passes is not None and args.save is not None
    asks = changes_revising(args) or args.order is not None and not saves_scores
    if not revisions and args.iterations > 1 and asks:
        raise InputError(f'plan {config.plan} takes all {args.iterations} iterations and leaves none to revise, '
                         f'as another flag asks for; give a smaller --plan-passes')
    fewest = 2 if config.plan_passes == 1 else 1    # what the pass before has filled is not kept yet
    wanted = {'--remask-kept': (args.remask_kept > 0, fewest), '--no-revise': (args.no_revise, fewest),
              '--end-ratio': (args.end_ratio is not None, 2)}
    more = '--iterations' if args.masking_ratios is None else '--masking-ratios'
    for flag, (is_given, n) in wanted.items():
        if is_given and revisions < n:
            raise InputError(f'found {flag} with {revisions} of {args.iterations} iterations to revise, wanted at '
                             f'least {n}; give more {more}')


def require_sight(config, free, block_size):
    """InputError for a plan that does not see text given behind a blank, where nothing is revised.

    free (B, T) bool: all but given text.
    """
    begins = int((~free[0]).cumprod(0).sum()) or int(free.size(1) > block_size)    # later windows begin with text
    if reads_blockwise(config.plan, config.plan_passes, begins) and not config.mask_ratios:
        raise InputError(f'--plan {config.plan} reads from left to right and would not see the text behind a blank; '
                         f'wanted --plan wavefront, interleaved, spans or random')


def require_speculative(args, config):
    """InputError for flags that --plan speculative has no use for."""
    revises = args.iterations > 1 and is_about_revising(args)
    ignored = {
        '--disable-sampler, or a model without a sampler head that has learned, to draft; wanted another --plan':
            not config.use_sampler,
        '--corrections; leave out --plan, or give --plan blocks': args.corrections > 0,
        '--end-temperature; leave out --plan, or give --plan blocks': args.end_temperature is not None,
        'a flag about revising, and what has been checked is not revised; leave out --plan': revises,
        f'--plan-passes {args.plan_passes} and --iterations {args.iterations}, for it leaves none to revise; leave out '
        f'--plan-passes': config.plan_passes < args.iterations}
    for found, is_so in ignored.items():
        if is_so:
            raise InputError(f'--plan speculative does not go with {found}')


def described(config, windows=1):
    """A DecoderConfig in words: by what, in which order, in how many passes; windows: that cover a sequence."""
    plan = f', plan {config.plan}' if config.use_sampler or config.plan != 'wavefront' else ''    # naively it has none
    most = 'at most ' if config.plan == 'speculative' and config.passes > 1 else ''
    return f'{"with the sampler head" if config.use_sampler else "naively"}{plan}, {most}{passes_text(config.passes)}' \
        + (f' over each of {windows} windows' if windows > 1 else '')


def is_about_revising(args):
    """Was a flag given that only means something where tokens are remasked?"""
    return args.order is not None or changes_revising(args)


def changes_revising(args):
    """As is_about_revising, but for --order, which the scores of --save follow too."""
    shares = args.start_ratio, args.end_ratio, args.masking_ratios
    return any(share is not None for share in shares) or args.schedule_mode == 'threshold' or args.no_revise \
        or args.randomness_strength > 0


def load_judge(args, corpus, device):
    """The judge, from --out-dir or a path of its own."""
    path = args.judge_checkpoint_name
    if not os.path.exists(path):
        path = os.path.join(args.out_dir, path)
    return Judge.load(path, corpus, device)


def record(step, i):
    """What sequence i of a batch became in one pass, as --save writes it: plain values. step: see decode_window."""
    names = {'xt': 'input_masked', 'x': 'output_unmasked', 'wave': 'wave', 'remask_score': 'remask_score'}
    per_token = {name: step[key] for key, name in names.items() if key in step}    # an animation needs no scores
    marked = {f'{name}_indices': (step[name][i].nonzero()[:, 0] + step['start']).tolist()
              for name in ('remasked', 'corrected')}
    return {'iteration': step['pass'], 'block_start': step['start']} \
        | {name: values[i].tolist() for name, values in per_token.items()} | marked


class Stopped(Exception):
    """A signal came: the batch at hand is given up."""


class Progress:
    """Shows every pass, on a bar, in lines or as an Animation of the first sample, and keeps it for --save.

    It ends with Stopped after a signal.
    """

    def __init__(self, args, tokenizer, total, stop, animation=None):
        self.args, self.tokenizer, self.stop, self.animation = args, tokenizer, stop, animation
        self.lines = not args.no_progress and not sys.stderr.isatty()
        self.bar = tqdm(total=total, unit='pass', disable=args.no_progress or self.lines or animation is not None)
        self.history, self.count = [], 0

    def begin(self, sequences):
        self.sequences, self.first = sequences, len(self.history)
        self.history += [[] for _ in sequences]

    @property
    def wanted(self):
        """What decoding makes for the flags alone: scores of every token after every pass, and in the end."""
        shows_quality = self.args.quality_metric != 'none' and not self.args.judge_checkpoint_name
        return ['remask_score'] * bool(self.args.save) + ['p_generated'] * shows_quality

    def __call__(self, step):
        if self.stop.number:
            raise Stopped
        self.bar.update()
        self.count += 1
        if self.lines and (self.args.verbose or self.count % 10 == 0):    # a log of a long run, nothing in a short one
            print(f'samples {self.sequences[0]}-{self.sequences[-1]}, from token {step["start"]}, pass '
                  f'{step["pass"] + 1}: {step["remasked"].float().mean().item():.0%} left to fill', file=sys.stderr)
        if self.args.verbose and self.sequences[0] == 0:
            ids = torch.where(step['remasked'], self.tokenizer.mask_id, step['x'])[0].tolist()
            tqdm.write(f'--- pass {step["pass"] + 1}\n' + self.tokenizer.decode(ids, PLACEHOLDER))
        if self.animation and self.sequences[0] == 0:
            self.animation.show(record(step, 0))
        if self.args.save:
            at_work = (step['xt'] == self.tokenizer.mask_id).any(1).tolist()    # a finished sample waits for the others
            for i, passes in enumerate(self.history[self.first:]):
                if at_work[i] or step['pass'] == 0:
                    passes.append(record(step, i))


@dataclass
class Decoding:
    """What decoding some samples gave."""
    tokens: list     # of each sample
    p_real: list     # the critic's mean chance that its tokens are real; empty without a critic
    history: list    # of each sample: a record of every pass, for --save
    passes: int      # forward passes, one after another
    waves: int       # sequential steps of filling


def decode(args, model, x, free, config, numbers, device, dtype, progress):
    """Decode the samples with these numbers, a range, in batches; after a signal, those whose batches are done."""
    tokens, p_real, passes, waves = [], [], 0, 0
    for start in numbers[::args.batch_size]:
        part = slice(start, min(start + args.batch_size, numbers.stop))
        progress.begin(range(part.start, part.stop))
        try:
            with autocast(device, dtype):
                decoded = generate(model, x[part].to(device), free[part].to(device), config, progress.sequences,
                                   progress, progress.wanted)
        except Stopped:
            break
        tokens += decoded.x.tolist()
        if decoded.p_generated is not None:
            n_free = free[part].sum(1).clamp(min=1)
            p_real += (1 - decoded.p_generated.sum(1).cpu() / n_free).tolist()
        passes, waves = passes + decoded.passes, waves + decoded.waves
    progress.bar.close()
    return Decoding(tokens, p_real, progress.history[:len(tokens)], passes, waves)


def together(parts, n):
    """The Decoding of n samples that several processes shared, up to the first that a signal kept from being made."""
    whole = Decoding([], [], [], max(part.passes for part in parts), max(part.waves for part in parts))
    for rank, part in enumerate(parts):
        if len(whole.tokens) == share_of(n, rank, len(parts)).start:
            whole.tokens, whole.p_real = whole.tokens + part.tokens, whole.p_real + part.p_real
            whole.history += part.history
    return whole


def generate_text(args, processes):
    """Decode, score, save and show what the flags of sample_simple.py ask for; several processes share the samples.

    Returns the number of the signal that ended it early, else 0.
    """
    # 1. model, judge, prompts
    if args.seed == -1:
        args.seed = processes.of_first(lambda: secrets.randbelow(2 ** 31))
        print(f'seed: {args.seed}')
    path = checkpoint_path(args)
    model, tokenizer, saved = load_model(path)
    require_generator(model, path)
    for head in untrained_heads(saved):
        print(f'note: the {head} head had not begun to learn when {path} was saved, and is left out')
    x, free = given_text(args, tokenizer, model.config.block_size)
    length = x.size(1)
    prefix_only = is_prefix(args, free)
    config = decoder_config(args, model, path, prefix_only)
    if not prefix_only:
        require_sight(config, free, model.config.block_size)
    if args.quality_metric == 'node' and model.critic_head is None:
        raise InputError(f'{path!r} has no critic head that has learned, which --quality-metric node needs')
    device = processes.device
    dtype = processes.of_first(lambda: pick_dtype(args.dtype, device))
    judge = load_judge(args, saved['corpus'], device) if args.judge_checkpoint_name else None
    model = model.to(device, torch.float64 if dtype == 'float64' else torch.float32).requires_grad_(False)
    if judge and not judge.is_scorer and length < 2:
        raise InputError('--sequence-length is 1, and a causal judge scores what follows the first token; wanted 2')
    tokens = min(args.num_samples, args.batch_size) * min(length, model.config.block_size)
    memory.require(memory.of_activations(model.config, tokens) // model.config.n_layer, device,
                   f'decoding {tokens} tokens at a time')
    trained = f'heads of iteration {saved["iter_num"]} on a finished trunk' if saved['config'].get('freeze_trunk') \
        else f'iteration {saved["iter_num"]}'
    print(f'{path}: {trained}, trained on {saved["corpus"]["name"]}; decoding '
          f'{described(config, len(windows(length, model.config.block_size)))}, {device}, {dtype}, seed {args.seed}')
    if not free.any():
        print('note: --seed-text fills the sequence, nothing is left to generate')

    # 2. decode
    numbers = processes.share(args.num_samples)
    n_batches = math.ceil(len(numbers) / args.batch_size)
    n_passes = n_batches * len(windows(length, model.config.block_size)) * config.passes
    args.no_progress = args.no_progress or not processes.master_process
    shown = args.animate and processes.master_process
    with signals.noted('this pass, with the samples that are done') as stop, \
            Animation(x[0].tolist(), tokenizer, args.animate) if shown else nullcontext() as animation:
        progress = Progress(args, tokenizer, n_passes, stop, animation)
        clock = time.perf_counter()
        own = decode(args, model, x, free, config, numbers, device, dtype, progress)
        done = together(processes.gathered(own), args.num_samples)
        seconds = time.perf_counter() - clock - (animation.seconds if animation else 0)
        stopped_by = processes.largest(stop.number)
    if not processes.master_process:
        return stopped_by

    # 3. score, save, show
    texts, scores, meaning = [tokenizer.decode(ids) for ids in done.tokens], [], ''
    if judge and texts:
        ids = torch.tensor(done.tokens).split(args.batch_size)
        scores = [score for part in ids for score in judge.score(part.to(device)).tolist()]
        meaning = f'by {args.judge_checkpoint_name}: {judge.meaning}'
    elif args.quality_metric != 'none' and done.p_real and free.any():
        scores, meaning = done.p_real, 'by the critic: 0 is seen through, 0.5 cannot be told from real text'
    unsaved = None
    if args.save and texts:
        samples = [{'text': text, 'tokens': ids, 'quality': scores[i] if scores else None,
                    'iterations': done.history[i]} for i, (text, ids) in enumerate(zip(texts, done.tokens))]
        settings = vars(args) | vars(config) | {'device': device, 'dtype': dtype, 'checkpoint': path}
        data = {'schema': SCHEMA, 'settings': settings, 'vocabulary': saved['corpus'], 'mask_id': tokenizer.mask_id,
                'seconds': seconds, 'forward_passes': done.passes, 'waves': done.waves, 'samples': samples}
        try:
            write_atomically(args.save, json.dumps(data).encode())
        except WriteError as error:    # the texts are shown all the same
            unsaved = error
    for i, text in enumerate(texts):
        print(f'--- sample {i}' + (f', quality {scores[i]:.3f}' if scores else '') + f'\n{text}')
    print('---')
    if scores:
        print(f'mean quality {sum(scores) / len(scores):.3f}, {meaning}')
    print(f'{len(texts)} sample{"s" * (len(texts) != 1)} of {length} tokens in {seconds:.2f} s: '
          f'{passes_text(done.passes)}, {done.waves} waves, {int(free[:len(texts)].sum()) / seconds:,.0f} tokens/s')
    if unsaved:
        raise unsaved
    if args.save and texts:
        print(f'saved {args.save}')
    if stopped_by:
        print(f'{signals.name_of(stopped_by)} after {len(texts)} of {args.num_samples} samples', file=sys.stderr)
    return stopped_by
