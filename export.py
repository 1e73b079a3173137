"""Makes a small file of a trained model: its weights in bfloat16, without what only further training needs.

    python export.py out-char-diffusion/ckpt.pt my_model.pt
    python sample_simple.py --out-dir . --checkpoint-name my_model.pt
"""
import environment    # before torch

import argparse
import os

import torch

import checkpoint
from errors import InputError, run

KEPT = ('model_args', 'iter_num', 'start_iter', 'corpus', 'commit')
LOCAL = ('out_dir', 'data_dir', 'generator_checkpoint', 'trunk_checkpoint', 'wandb_log', 'wandb_project',
         'wandb_run_name')


def exported(saved):
    """The part of a checkpoint that decoding needs, its weights in bfloat16; names of local paths are left out.

    Every reader of checkpoints but --init_from=resume takes it; computation stays in the precision that they choose.
    """
    weights = {name: w.to(torch.bfloat16) if w.is_floating_point() else w for name, w in saved['model'].items()}
    config = {name: value for name, value in saved['config'].items() if name not in LOCAL}
    return {name: saved[name] for name in KEPT if name in saved} | {'model': weights, 'config': config}


def parser():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('checkpoint', help='file that train.py wrote')
    parser.add_argument('file', help='file to write; one that exists is not replaced')
    return parser


def main():
    args = parser().parse_args()
    if os.path.exists(args.file):
        raise InputError(f'{args.file!r} exists; wanted a new name')
    saved = checkpoint.load(args.checkpoint)
    checkpoint.model_config(saved, args.checkpoint)    # weights that fit
    checkpoint.save(args.file, exported(saved))
    print(f'saved {args.file}: iteration {saved["iter_num"]}, {os.path.getsize(args.file) / 1e6:.1f} MB, from '
          f'{os.path.getsize(args.checkpoint) / 1e6:.1f} MB')


if __name__ == '__main__':
    run(main)
