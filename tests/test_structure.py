"""The shape of the repository: imports point one way, files and lines stay short."""
import ast
import glob
import os
import re

import pytest

from conftest import ROOT, imported_by

ALL = sorted(os.path.basename(path).removesuffix('.py') for path in glob.glob(os.path.join(ROOT, '*.py')))
FILES = [os.path.relpath(path, ROOT) for pattern in ('*.py', 'tests/*.py', 'config/*.py', 'data/*/*.py')
         for path in glob.glob(os.path.join(ROOT, pattern))]
PAGES = [os.path.relpath(path, ROOT) for pattern in ('*.md', 'docs/*.md', 'pretrained/*.md')
         for path in glob.glob(os.path.join(ROOT, pattern))]
# the benchmark measures the training step itself, whose settings are the names at the top of train.py
SCRIPTS_OF_SCRIPTS = {('bench', 'train')}


def lines_of(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read().splitlines()


def scripts():
    return {name for name in ALL if any(line.startswith('if __name__ ==') for line in lines_of(f'{name}.py'))}


def test_scripts_import_modules_and_nothing_imports_scripts():
    assert {'train', 'sample_simple', 'evaluate', 'bench'} <= scripts() and 'model' not in scripts()
    found = {(name, other) for name in ALL for other in imported_by(name) if other in scripts()}
    assert found == SCRIPTS_OF_SCRIPTS


def test_imports_form_no_circle():
    """A module can be read when those that it imports have been."""
    left = {name: imported_by(name) for name in ALL}
    while left:
        ready = [name for name, needed in left.items() if not needed & set(left)]
        assert ready, f'a circle among {sorted(left)}'
        for name in ready:
            del left[name]


def test_no_module_uses_private_names_of_another():
    for name in ALL:
        for node in ast.walk(ast.parse('\n'.join(lines_of(f'{name}.py')))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ALL:
                names = [node.attr]
            assert not [n for n in names if n.startswith('_')], f'{name}.py, line {node.lineno}'


@pytest.mark.parametrize('path', FILES)
def test_files_and_lines_of_code_are_short(path):
    lines = lines_of(path)
    assert len(lines) <= 400
    assert [(i, line) for i, line in enumerate(lines, 1) if len(line) > 120] == []


@pytest.mark.parametrize('path', PAGES)
def test_lines_of_prose_are_short(path):
    """Tables apart, and lines that a link alone makes long."""
    long = [(i, line) for i, line in enumerate(lines_of(path), 1) if len(line) > 120 and not line.startswith('|')]
    assert [(i, line) for i, line in long if len(re.sub(r'\]\([^)]*\)|<http[^>]*>', '', line)) > 120] == []
