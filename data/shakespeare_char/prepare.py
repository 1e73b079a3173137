"""Tiny Shakespeare by character: python data/shakespeare_char/prepare.py

Uses input.txt in this folder, or downloads it there.
"""
import hashlib
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))
import corpus

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def read():
    """The text and what it is: input.txt may be another one."""
    text = corpus.download(URL, os.path.join(HERE, 'input.txt'), SHA256)
    same = hashlib.sha256(text.encode()).hexdigest() == SHA256
    return text, 'tiny Shakespeare' if same else 'input.txt, which is not tiny Shakespeare'


def prepare(data_dir=corpus.DATA_DIR, overwrite=False):
    corpus.prepare_text('shakespeare_char', *read(), data_dir=data_dir, overwrite=overwrite)


if __name__ == '__main__':
    corpus.run(prepare, __doc__)

# shakespeare_char: 1,115,394 characters from tiny Shakespeare
# train.bin: 1,003,854 tokens
# val.bin: 111,540 tokens
# vocabulary: 66 with [MASK]
