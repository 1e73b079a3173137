"""Generates text from a checkpoint: by wavefront where it has a sampler head, else naively.

    python sample_simple.py --out-dir out-char-diffusion --num-samples 16 --iterations 15
    python sample_simple.py --seed-text "To be or not to be" --seed-placement random --save out.json
    python sample_simple.py --disable-sampler

The same seed gives the same noise to both decoders, so their outputs can be compared sample by sample.
"""
import argparse
import json
import os
import secrets
import sys
import time

import torch
from tqdm import tqdm

from checkpoint import load_model, want_generator, want_vocabulary
from corpus import write_atomically
from device import DTYPES, autocast, pick_device, pick_dtype
from diffusion import PLACES, Decoder, blocks, generate, linear_ratios
from errors import InputError, run
from judge import Judge
from noise import uniform

SCHEMA = 1    # of the file that --save writes
# defaults below 8 iterations, which have less time to begin again and more to correct, and from 8 on (docs/evaluation.md)
FEW = {'start_ratio': 0.7, 'end_ratio': 0.1, 'corrections': 24}
MANY = {'start_ratio': 0.95, 'end_ratio': 0.05, 'corrections': 0}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--out-dir', default='out-char-diffusion', help='folder of the checkpoint')
    add('--checkpoint-name', default='ckpt.pt', help='file in it')
    add('--num-samples', type=int, default=4, help='rows to generate')
    add('--sequence-length', type=int, default=0, help='tokens in a row; 0 is the model\'s block; longer ones take several blocks')
    add('--batch-size', type=int, default=64, help='rows decoded at a time')
    add('--iterations', type=int, help='trunk passes over a block (default: 15)')
    add('--temperature', type=float, default=0.8, help='0 takes the likeliest token')
    add('--end-temperature', type=float, help='that of the last pass, reached evenly (default: the same, below 8 iterations 0.1)')
    add('--top-p', type=float, default=1.0, help='keep the likeliest tokens up to this probability')
    add('--schedule-mode', choices=('ratio', 'threshold'), default='ratio', help='remask a share, or what is above --threshold')
    add('--start-ratio', type=float, help='share remasked after the first pass (default: 0.95, below 8 iterations 0.7)')
    add('--end-ratio', type=float, help='share remasked before the last pass (default: 0.05, below 8 iterations 0.1)')
    add('--masking-ratios', type=ratios, help='shares after each pass but the last, such as 0.6,0.3,0.1')
    add('--threshold', type=float, default=0.5, help='wrongness above which a token is remasked')
    add('--order', choices=('confidence', 'critic', 'random'),
        help='what is remasked first (default: critic where there is one and the sampler, whose fills it knows)')
    add('--no-revise', action='store_true', help='never remask a token that was kept once')
    add('--corrections', type=int, help='times that the sampler head redoes its worst tokens after each pass, without the trunk '
        '(default: 0, below 8 iterations 24)')
    add('--correction-ratio', type=float, default=0.6, help='share of what the pass filled that the first of them redoes; the share falls evenly')
    add('--randomness-strength', type=float, default=0.0, help='of the annealed Gumbel noise on that order')
    add('--disable-sampler', action='store_true', help='decode naively, each token from its own marginal')
    add('--seed-text', default='', help='text that every sample contains')
    add('--seed-placement', choices=('prefix', 'random'), default='prefix', help='where it stands')
    add('--quality-metric', choices=('none', 'node', 'judge'), help='node: by the critic (default where there is one)')
    add('--judge-checkpoint-name', help='file in --out-dir, or a path')
    add('--seed', type=int, default=1337, help='-1 draws one')
    add('--device', default='auto', help='auto, cuda, mps, cpu')
    add('--dtype', default='auto', choices=('auto', *DTYPES))
    add('--save', metavar='FILE', help='write samples and every step of their making as JSON')
    add('--verbose', action='store_true', help='show the first sample after every pass')
    add('--no-progress', action='store_true', help='no bar, no lines')
    return parser.parse_args()


def ratios(text):
    """'0.6,0.3' -> [0.6, 0.3]"""
    return [float(part) for part in text.split(',')]


def check(args):
    """InputError for a value out of range; settles what depends on another flag."""
    for name, low, high in (('num_samples', 1, None), ('sequence_length', 0, None), ('batch_size', 1, None), ('iterations', 1, None),
                            ('temperature', 0, None), ('end_temperature', 0, None), ('top_p', 1e-6, 1), ('start_ratio', 0, 1), ('end_ratio', 0, 1),
                            ('threshold', 1e-6, 1), ('corrections', 0, None), ('correction_ratio', 0, 1),
                            ('randomness_strength', 0, None), ('seed', -1, None)):
        value = getattr(args, name)
        if value is not None and not (value >= low and (high is None or value <= high)):
            raise InputError(f'--{name.replace("_", "-")} is {value}, wanted ' + (f'at least {low}' if high is None else f'{low} to {high}'))
    if args.masking_ratios is not None:
        if not all(0 <= r <= 1 for r in args.masking_ratios):
            raise InputError(f'--masking-ratios has {args.masking_ratios}, wanted numbers in [0, 1]')
        found, args.iterations = args.iterations, len(args.masking_ratios) + 1
        if found not in (None, args.iterations):
            raise InputError(f'{len(args.masking_ratios)} --masking-ratios make {args.iterations} iterations, found --iterations {found}')
    args.iterations = args.iterations or 15
    few = args.iterations < 8
    defaults = (FEW if few else MANY) | {'end_temperature': min(0.1, args.temperature) if few else args.temperature}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.masking_ratios is None:
        args.masking_ratios = linear_ratios(args.iterations, args.start_ratio, args.end_ratio)
    if args.save and not os.path.isdir(os.path.dirname(args.save) or '.'):
        raise InputError(f'--save {args.save!r}: no folder {os.path.dirname(args.save)!r}')
    if args.seed == -1:
        args.seed = secrets.randbelow(2 ** 31)
        print(f'seed: {args.seed}')


def prompt_rows(args, tokenizer, length):
    """Rows with the seed text in place: x (num_samples, length) ids and free (num_samples, length) bool."""
    prompt = torch.tensor(tokenizer.encode(args.seed_text), dtype=torch.long)
    if len(prompt) > length:
        raise InputError(f'--seed-text has {len(prompt)} tokens, wanted at most the sequence length, {length}')
    starts = torch.zeros(args.num_samples, dtype=torch.long)
    if args.seed_placement == 'random':
        u = uniform(args.seed, PLACES, range(args.num_samples), 0, [0])[:, 0]
        starts = (u * (length - len(prompt) + 1)).long()
    at = starts[:, None] + torch.arange(len(prompt))
    x = torch.full((args.num_samples, length), tokenizer.mask_id).scatter(1, at, prompt.expand(args.num_samples, -1))
    return x, torch.ones_like(x, dtype=torch.bool).scatter(1, at, False)


def load_judge(args, corpus, device):
    """The judge, from --out-dir or a path of its own."""
    path = args.judge_checkpoint_name
    if not os.path.exists(path):
        path = os.path.join(args.out_dir, path)
    model, _, saved = load_model(path)
    want_vocabulary(saved['corpus'], path, corpus)
    return Judge(model.to(device), path, saved['corpus'])


class Watcher:
    """Shows every pass on a bar or in lines and keeps it for --save."""

    def __init__(self, args, tokenizer, total):
        self.args, self.tokenizer = args, tokenizer
        self.lines = not args.no_progress and not sys.stderr.isatty()
        self.bar = tqdm(total=total, unit='pass', disable=args.no_progress or self.lines)
        self.history = []

    def begin(self, rows):
        self.rows, self.first = rows, len(self.history)
        self.history += [[] for _ in rows]

    def __call__(self, step):
        self.bar.update()
        waves, remasked = int(step['wave'].max()) + 1, step['remasked'].float().mean().item()
        if self.lines:
            print(f'rows {self.rows[0]}-{self.rows[-1]}, from token {step["start"]}, pass {step["pass"] + 1}: '
                  f'{waves} wave{"s" if waves > 1 else ""}, {remasked:.0%} remasked', file=sys.stderr)
        if self.args.verbose and self.rows[0] == 0:
            tqdm.write(f'--- pass {step["pass"] + 1}\n' + self.tokenizer.decode(
                torch.where(step['remasked'], self.tokenizer.mask_id, step['x'])[0].tolist()))
        if self.args.save:
            step = {name: value.tolist() if torch.is_tensor(value) else value for name, value in step.items()}
            for i, passes in enumerate(self.history[self.first:]):
                passes.append({'iteration': step['pass'], 'block_start': step['start'], 'input_masked': step['xt'][i],
                               'output_unmasked': step['x'][i], 'wave': step['wave'][i], 'wrongness': step['wrong'][i],
                               'remasked_indices': [step['start'] + j for j, r in enumerate(step['remasked'][i]) if r]})


def main():
    args = arguments()
    check(args)
    path = os.path.join(args.out_dir, args.checkpoint_name)
    model, tokenizer, saved = load_model(path)
    want_generator(model, path)
    use_sampler = model.sampler_head is not None and not args.disable_sampler
    # the critic learned from the sampler's fills; naive ones it misleads
    args.order = args.order or ('critic' if use_sampler and model.critic_head is not None else 'confidence')
    if 'critic' in (args.order, {'node': 'critic'}.get(args.quality_metric)) and model.critic_head is None:
        raise InputError(f'{path!r} has no critic head, which --order critic and --quality-metric node need')
    if (args.quality_metric == 'judge') != bool(args.judge_checkpoint_name):
        raise InputError(f'found --quality-metric {args.quality_metric} with --judge-checkpoint-name {args.judge_checkpoint_name}, '
                         f'wanted both or neither; python train.py config/train_judge.py trains a judge')
    device = pick_device(args.device)
    judge = load_judge(args, saved['corpus'], device) if args.judge_checkpoint_name else None
    dtype = pick_dtype(args.dtype, device)
    model = model.to(device, torch.float64 if dtype == 'float64' else torch.float32)
    metric = args.quality_metric or ('none' if model.critic_head is None else 'node')
    decoder = Decoder(use_sampler=use_sampler, order=args.order, revise=not args.no_revise, ratios=tuple(args.masking_ratios),
                      threshold=args.threshold if args.schedule_mode == 'threshold' else 0.0, temperature=args.temperature,
                      end_temperature=args.end_temperature, top_p=args.top_p, randomness_strength=args.randomness_strength,
                      corrections=args.corrections, correction_ratio=args.correction_ratio, seed=args.seed)
    length = args.sequence_length or model.config.block_size
    x, free = prompt_rows(args, tokenizer, length)
    print(f'{path}: iteration {saved["iter_num"]}, trained on {saved["corpus"]["name"]}; decoding '
          f'{"by wavefront" if use_sampler else "naively"}, {decoder.passes} iterations, {device}, {dtype}, seed {args.seed}')

    # decode
    batches = range(0, args.num_samples, args.batch_size)
    watcher = Watcher(args, tokenizer, len(batches) * len(blocks(length, model.config.block_size)) * decoder.passes)
    tokens, flaws, passes, waves, clock = [], [], 0, 0, time.time()
    for start in batches:
        rows = range(start, min(start + args.batch_size, args.num_samples))
        watcher.begin(rows)
        with autocast(device, dtype):
            filled, flaw, p, w = generate(model, x[start:rows.stop].to(device), free[start:rows.stop].to(device), decoder, rows, watcher)
        tokens += filled.tolist()
        flaws += [] if flaw is None else (flaw.sum(1).cpu() / free[start:rows.stop].sum(1).clamp(min=1)).tolist()
        passes, waves = passes + p, waves + w
    seconds = time.time() - clock
    watcher.bar.close()

    # show and save
    texts = [tokenizer.decode(ids) for ids in tokens]
    scores, meaning = [], ''
    if metric == 'node':
        scores, meaning = [1 - flaw for flaw in flaws], 'by the critic: 0 is seen through, 0.5 cannot be told from real text'
    if metric == 'judge':
        scores = [s for part in torch.tensor(tokens).split(args.batch_size) for s in judge.score(part.to(device)).tolist()]
        meaning = f'by {args.judge_checkpoint_name}: {judge.meaning}'
    for i, text in enumerate(texts):
        print(f'--- sample {i}' + (f', quality {scores[i]:.3f}' if scores else '') + f'\n{text}')
    print('---')
    if scores:
        print(f'mean quality {sum(scores) / len(scores):.3f}, {meaning}')
    generated = int(free.sum())
    print(f'{args.num_samples} samples of {length} tokens in {seconds:.2f} s: {passes} trunk passes, {waves} waves, '
          f'{generated / seconds:,.0f} tokens/s')
    if args.save:
        settings = vars(args) | {'device': device, 'dtype': dtype, 'sampler': use_sampler, 'checkpoint': path}
        samples = [{'text': text, 'tokens': ids, 'quality': scores[i] if scores else None, 'iterations': watcher.history[i]}
                   for i, (text, ids) in enumerate(zip(texts, tokens))]
        write_atomically(args.save, json.dumps({
            'schema': SCHEMA, 'settings': settings, 'vocabulary': saved['corpus'], 'mask_id': tokenizer.mask_id,
            'seconds': seconds, 'trunk_passes': passes, 'waves': waves, 'samples': samples}).encode())
        print(f'saved {args.save}')


if __name__ == '__main__':
    run(main)
