"""docs/sampler.md: the worked example by hand is what the shipped model and the decoder compute."""
import math
import os
import re

import pytest
import torch

from checkpoint import load_model
from conftest import ROOT
from filling import HeadFiller
from likelihood import log_likelihood
from plans import Plan
from sampler import wave_numbers

with open(os.path.join(ROOT, 'docs', 'sampler.md'), encoding='utf-8') as f:
    PAGE = f.read()
TEMPLATE = 'Speak to h__ again.'


@pytest.fixture(scope='module')
def computed():
    """Logits over the vocabulary of the two masked positions: {case of the page: (V - 1,)}."""
    model, tokenizer, _ = load_model(os.path.join(ROOT, 'pretrained', 'tiny_shakespeare.pt'))
    at = TEMPLATE.index('_')
    x = torch.tensor([[tokenizer.mask_id if c == '_' else tokenizer.encode(c)[0] for c in TEMPLATE]])
    with torch.no_grad():
        hidden, filler = model(x), HeadFiller(model)

        def head(position, x):
            where = torch.tensor([0]), torch.tensor([position])
            around = filler.around(x, where)
            view = hidden[where]
            return filler.logits(filler.view(view), filler.features(filler.head.project(view), around))[0]
        trunk = model.lm_head(hidden)[0].float()
        found = {'transformer, first blank': trunk[at], 'transformer, second blank': trunk[at + 1],
                 'head, first blank': head(at, x)}
        for letter in 'ei':
            filled = x.clone()
            filled[0, at] = tokenizer.encode(letter)[0]
            found[f'head, second blank after `{letter}`'] = head(at + 1, filled)
    return model, tokenizer, x, found


def rows():
    """{case: {letter: (logit, probability)}} of the page's table."""
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in PAGE.splitlines()
             if re.match(r'\| (transformer|head), (first|second) blank', line)]
    return {name: {letter: (float(logit), float(p)) for letter, logit, p in re.findall(
        r'`(\w)` (-?[\d.]+), ([\d.]+)', '; '.join(values))} for name, *values in cells}


def test_the_logits_of_the_page_are_those_of_the_shipped_model(computed):
    _, tokenizer, _, found = computed
    assert set(rows()) == set(found) and all(len(letters) == 2 for letters in rows().values())
    for name, letters in rows().items():
        prob = found[name].double().softmax(0)
        for letter, (logit, p) in letters.items():
            (i,) = tokenizer.encode(letter)
            assert (found[name][i].item(), prob[i].item()) == (pytest.approx(logit, abs=0.011),
                                                               pytest.approx(p, abs=0.0011)), (name, letter)


def test_the_products_of_the_page(computed):
    """From its own numbers, and from the decoder's exact likelihood."""
    model, tokenizer, x, _ = computed
    said, table = {}, rows()
    for word, naive, head in re.findall(r'^\| `(\w{3})` \| ([\d.]+) \| ([\d.]+) \|$', PAGE, re.M):
        said[word] = {False: float(naive), True: float(head)}
    assert set(said) == {'her', 'him', 'hem', 'hir'}
    wave = wave_numbers(x == model.mask_id, torch.zeros_like(x, dtype=torch.bool))
    plan = Plan(torch.where(x == model.mask_id, 0, -1), wave)
    for word, p in said.items():
        a, b = word[1:]
        naive = table['transformer, first blank'][a][1] * table['transformer, second blank'][b][1]
        assert p[False] == pytest.approx(naive, abs=0.0015)
        head = table['head, first blank'][a][1] * table[f'head, second blank after `{a}`'][b][1]
        assert p[True] == pytest.approx(head, abs=0.0015)
        text = x.clone()
        text[x == model.mask_id] = torch.tensor(tokenizer.encode(a + b))
        for use_sampler, value in p.items():
            exact = math.exp(log_likelihood(model, text, plan, use_sampler).sum())
            assert exact == pytest.approx(value, abs=0.0015), (word, use_sampler)


def test_the_waves_of_the_page():
    """a and b are known, . is masked."""
    tokens, waves = re.search(r'^    tokens   (.*)\n    waves    (.*)$', PAGE, re.M).groups()
    masked = torch.tensor([[c == '.' for c in tokens[::2]]])
    found = wave_numbers(masked, torch.zeros_like(masked))[0]
    assert waves[::2].ljust(len(tokens[::2])) == ''.join(
        str(w) if m else ' ' for w, m in zip(found.tolist(), masked[0].tolist()))
    assert set(tokens[::2]) == {'a', 'b', '.'}
