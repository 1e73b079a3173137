"""Tiny Shakespeare by GPT-2 byte pairs: python data/shakespeare/prepare.py"""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))
import corpus
from data.shakespeare_char.prepare import read


def prepare(data_dir=corpus.DATA_DIR, overwrite=False):
    corpus.prepare_text('shakespeare', *read(), kind='gpt2', data_dir=data_dir, overwrite=overwrite)


if __name__ == '__main__':
    corpus.run(prepare, __doc__)
