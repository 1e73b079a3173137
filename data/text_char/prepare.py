"""Any UTF-8 text, a file or a folder of files, by character: python data/text_char/prepare.py my.txt --name my_corpus

    python data/text_char/prepare.py letters/ --suffix .md --name letters
    python data/text_char/prepare.py my.txt --name my_corpus --byte-pairs

Then train on it: python train.py config/train_char_diffusion_sampler.py --dataset=my_corpus
"""
import argparse
import os
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))
import corpus
import errors
from progress import bar


def parser():
    parser = argparse.ArgumentParser(description='Prepare a corpus from any UTF-8 text.')
    parser.add_argument('path', help='the text file, or a folder of them')
    parser.add_argument('--name', default='text_char', help='of the corpus, a folder in data/ (default: text_char)')
    parser.add_argument('--suffix', help='in a folder, read the files whose names end so, those of '
                        'folders in it too (default: .txt)')
    parser.add_argument('--byte-pairs', action='store_true', help="GPT-2's byte pairs in place of characters")
    parser.add_argument('--data-dir', default=corpus.DATA_DIR, help='where corpora are kept (default: data/)')
    parser.add_argument('--overwrite', action='store_true', help='replace a corpus of another text or kind')
    return parser


def read(path, suffix):
    """Text of a file, or of all files of a folder in the order of their names, a line break between them."""
    if not os.path.isdir(path):
        if suffix is not None:
            raise errors.InputError(f'found --suffix {suffix!r} with {path!r}, which is no folder; leave it out')
        return corpus.read_text(path)
    suffix, files = '.txt' if suffix is None else suffix, []

    def refuse(error):
        raise errors.InputError(f'cannot read {error.filename!r}: {error.strerror}; wanted folders that can be read')
    for folder, folders, names in os.walk(path, onerror=refuse):
        files += [os.path.join(folder, name) for name in names if name.endswith(suffix)]
        for link in filter(os.path.islink, (os.path.join(folder, name) for name in folders)):
            print(f'note: {link!r} is a link to a folder, and is left out')
    if not files:
        raise errors.InputError(f'no file in {path!r} ends in {suffix!r}; give another --suffix')
    return '\n'.join(corpus.read_text(file) for file in bar(sorted(files), 'reading'))


def main():
    args = parser().parse_args()
    if not re.fullmatch(r'\w[\w-]*', args.name):
        raise errors.InputError(f'found --name {args.name!r}, wanted letters, digits, _ and -')
    if args.name != 'text_char' and os.path.exists(os.path.join(corpus.DATA_DIR, args.name, 'prepare.py')):
        raise errors.InputError(f'--name {args.name!r} is a built-in corpus, wanted another name')
    source = os.path.basename(os.path.normpath(args.path))
    kind = 'gpt2' if args.byte_pairs else 'char'
    corpus.prepare_text(args.name, read(args.path, args.suffix), source, kind, args.data_dir, args.overwrite)


if __name__ == '__main__':
    errors.run(main)
