"""Any UTF-8 text by character: python data/text_char/prepare.py my.txt --name my_corpus

Then train on it: python train.py config/train_char_diffusion_sampler.py --dataset=my_corpus
"""
import argparse
import os
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))
import corpus
import errors


def main():
    parser = argparse.ArgumentParser(description='Prepare a corpus of characters from any UTF-8 text.')
    parser.add_argument('path', help='the text file')
    parser.add_argument('--name', default='text_char', help='name of the corpus, a folder in data/')
    parser.add_argument('--data-dir', default=corpus.DATA_DIR, help='where corpora are kept')
    parser.add_argument('--overwrite', action='store_true', help='replace a corpus of another text')
    args = parser.parse_args()
    if not re.fullmatch(r'\w[\w-]*', args.name):
        raise errors.InputError(f'found --name {args.name!r}, wanted letters, digits, _ and -')
    if args.name != 'text_char' and os.path.exists(os.path.join(corpus.DATA_DIR, args.name, 'prepare.py')):
        raise errors.InputError(f'--name {args.name!r} is a built-in corpus, wanted another name')
    corpus.prepare_text(args.name, corpus.read_text(args.path), os.path.basename(args.path), data_dir=args.data_dir,
                        overwrite=args.overwrite)


if __name__ == '__main__':
    errors.run(main)
