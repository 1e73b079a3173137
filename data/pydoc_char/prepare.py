"""Python's own manual by character, always at hand: python data/pydoc_char/prepare.py"""
import os
import platform
import pydoc_data.topics
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))
import corpus


def prepare(data_dir=corpus.DATA_DIR, overwrite=False):
    text = '\n'.join(text for topic, text in sorted(pydoc_data.topics.topics.items()))
    source = f'the manual of Python {platform.python_version()}'
    corpus.prepare_text('pydoc_char', text, source, data_dir=data_dir, overwrite=overwrite)


if __name__ == '__main__':
    corpus.run(prepare, __doc__)

# pydoc_char: 465,048 characters from the manual of Python 3.11.7
# train.bin: 418,543 tokens
# val.bin: 46,505 tokens
# vocabulary: 104 with [MASK]
