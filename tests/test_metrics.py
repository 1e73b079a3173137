"""Measures of samples and scores: values by hand, standard errors by simulation, and the n-gram evaluator."""
import math
import random
from itertools import combinations

import numpy as np
import pytest
import torch

import metrics
from ngram import NGram, code_points


def grams(texts, n):
    return [metrics.hashes(text, n) for text in texts]


# -----------------------------------------------------------------------------
# rank statistics

def test_area_under_roc_by_hand():
    assert metrics.area_under_roc(torch.tensor([1, 1, 0, 0]), torch.tensor([4.0, 3.0, 2.0, 1.0])) == 1
    assert metrics.area_under_roc([1, 0, 1, 0], [4.0, 3.0, 2.0, 1.0]) == 0.75
    assert math.isnan(metrics.area_under_roc([1, 1], [0.1, 0.2]))


def test_ties_count_half():
    """Scores of a run in bfloat16 tie often; ranking ties by their position in the batch gave 1.0 or 0.0 here."""
    ones = torch.ones(6, dtype=torch.bfloat16)
    assert metrics.area_under_roc(torch.tensor([1, 1, 1, 0, 0, 0]), ones) == 0.5
    assert metrics.area_under_roc(torch.tensor([0, 0, 0, 1, 1, 1]), ones) == 0.5


def test_rank_correlation_by_hand():
    assert metrics.rank_correlation(torch.tensor([1.0, 2, 3, 10]), [0.1, 0.2, 0.3, 0.4]) == pytest.approx(1)
    assert metrics.rank_correlation([3, 2, 1], [0.1, 0.2, 0.3]) == pytest.approx(-1)
    assert metrics.rank_correlation([1.0, 1, 2], [1.0, 2, 3]) == pytest.approx(0.8660254)
    assert math.isnan(metrics.rank_correlation([1.0, 1, 1], [1.0, 2, 3]))


# -----------------------------------------------------------------------------
# texts

def test_hashes_tell_ngrams_apart():
    texts = [''.join(random.Random(i).choices('ab c', k=300)) for i in range(20)]
    for n in (1, 4, 20):
        by_hand = [text[i:i + n] for text in texts for i in range(len(text) - n + 1)]
        assert len(np.unique(np.concatenate(grams(texts, n)))) == len(set(by_hand))
    assert len(metrics.hashes('abc', 4)) == 0
    assert (metrics.hashes('abcabc', 3)[[0, 3]] == metrics.hashes('abc', 3)).all()


def test_entropy_and_words_by_hand():
    assert metrics.unigram_entropy(grams(['ab', 'ab'], 1)) == pytest.approx(math.log(2))
    assert metrics.whole_words("cut don't stop xyz at") == ["don't", 'stop', 'xyz']
    assert metrics.in_vocabulary(["cut don't stop xyz at"], {"don't", 'stop', 'cut'}) == pytest.approx(2 / 3)
    assert metrics.mean_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))


def test_distinct_ngrams_average_over_every_choice_of_samples():
    texts = ['abcdeabcd', 'abcdxyzwv', 'qrstuvabc', 'abcdeabcd', 'mnopqrstu']
    for pool in (1, 2, 3, 5):
        counts = [len({t[i:i + 4] for t in chosen for i in range(6)}) for chosen in combinations(texts, pool)]
        by_hand = sum(counts) / len(counts) / (6 * pool)
        assert metrics.distinct_ngrams(grams(texts, 4), pool) == pytest.approx(by_hand)


def test_pool_has_a_fixed_number_of_characters():
    assert metrics.pool_size(['x' * 256] * 64) == metrics.pool_size(['x' * 256] * 200) == 32
    assert metrics.pool_size(['x' * 256] * 32) == 30, 'the jackknife leaves no more'
    assert metrics.pool_size(['x' * 256] * 4) == 3


def test_texts_of_other_lengths_are_counted_in_the_same_pool():
    """The pool went by the texts' own mean length: one character more and real text was 7% more diverse."""
    real = repetitive_texts(128, 0)
    reference = metrics.Reference.of('', real)
    longer = [text + ' ' for text in real]
    found = [metrics.describe(texts, {}, reference)['distinct4']['value'] for texts in (real, longer)]
    pool = metrics.pool_size(real)
    assert pool != metrics.pool_size(longer)
    assert found == [metrics.distinct_ngrams(grams(texts, 4), pool) for texts in (real, longer)]


def test_nothing_to_measure_is_no_best_value():
    assert metrics.in_vocabulary(['12 34!'] * 4, {'a'}) == metrics.repeated_within([metrics.hashes('ab', 20)] * 4) == 0


def repetitive_texts(n, seed):
    """Texts of the same 60 words, some of which repeat one of three phrases: diversity varies between samples."""
    rng = np.random.default_rng(0)
    words = [''.join(rng.choice(list('abcdefghij'), 3)) for _ in range(60)]
    phrases = [' '.join(rng.choice(words, 4)) for _ in range(3)]
    rng = np.random.default_rng([1, seed])
    return [' '.join([phrases[rng.integers(3)]] * 6 if rng.random() < 0.3 else rng.choice(words, 24)) for _ in range(n)]


@pytest.mark.parametrize('name, n', [('distinct4', 32), ('distinct4', 96), ('entropy', 48), ('divergence', 48)])
def test_standard_errors_are_those_of_repeated_experiments(name, n, monkeypatch):
    """The jackknife's error against the spread over 60 sets of samples: within a third, which is luck's part.

    Of many samples the first 8,192 characters were taken once: the rest moved nothing and the error was wrong.
    """
    monkeypatch.setattr(metrics, 'POOL', 2048)
    values, errors = [], []
    reference = metrics.Reference(set(), np.zeros(1, np.uint64), repetitive_texts(n, 999))
    for seed in range(60):
        measure = metrics.measures(repetitive_texts(n, seed), reference)[name]
        values.append(measure(range(n)))
        errors.append(metrics.jackknife_error([measure(kept) for kept in metrics.leave_out(n)]))
    assert 0.67 < np.sqrt(np.mean(np.square(errors))) / np.std(values, ddof=1) < 1.5


def test_every_sample_counts():
    """A change of any one of many samples moves diversity."""
    texts = [''.join(random.Random(i).choices('abcdefgh', k=256)) for i in range(80)]
    def distinct(texts):
        return metrics.distinct_ngrams(grams(texts, 4), metrics.pool_size(texts))
    for i in (0, 40, 79):
        assert distinct(texts[:i] + ['a' * 256] + texts[i + 1:]) < distinct(texts) - 1e-4


def test_divergence_by_hand():
    assert metrics.divergence(grams(['abab'], 1), grams(['abab'], 1)) == pytest.approx(0)
    assert metrics.divergence(grams(['aa'], 1), grams(['bb'], 1)) == pytest.approx(math.log(2))
    p, q = [0.5, 0.5], [1.0, 0.0]
    middle = [0.75, 0.25]
    by_hand = sum(a * math.log(a / m) / 2 for side in (p, q) for a, m in zip(side, middle) if a)
    assert metrics.divergence(grams(['ab'], 1), grams(['aa'], 1)) == pytest.approx(by_hand)


def test_repetition_and_memory_by_hand():
    texts = ['abcabc', 'bcax', 'zzzz']
    assert metrics.repeated_within(grams(texts, 3)) == pytest.approx((1 + 0 + 1) / (4 + 2 + 2))
    assert metrics.repeated_across(grams(texts, 3)) == pytest.approx((1 + 1) / 8)    # bca in both
    known = np.unique(metrics.hashes('xx abc bca', 3))
    assert metrics.share_found(grams(texts, 3), known) == pytest.approx((2 + 1 + 1) / 8)


def test_describe_gives_every_measure_with_its_error():
    texts = ['the cat sat on the mat. '[:i + 18] * 4 for i in range(6)]
    reference = metrics.Reference.of('the cat sat. the dog sat on a mat. ' * 5, texts[::-1])
    found = metrics.describe(texts, {'nll': [1.0, 2, 3, 4, 5, 6]}, reference)
    assert found['nll']['value'] == 3.5 and found['nll']['error'] == pytest.approx(math.sqrt(3.5 / 6))
    assert found['divergence']['value'] == pytest.approx(0, abs=1e-9), 'the same texts in another order'
    for name in ('entropy', 'distinct4', 'in_vocabulary_words', 'divergence', 'repeated_within', 'in_training_text'):
        assert found[name]['error'] >= 0 and len(found[name]['replicates']) == 6


# -----------------------------------------------------------------------------
# the n-gram evaluator

TEXT = 'the cat sat on the mat and the dog sat on the cat. ' * 4 + 'a rat ran at the cat. ' * 3


@pytest.mark.parametrize('order', [1, 2, 5])
@pytest.mark.parametrize('context', ['', 't', 'the c', 'zzz', 'q the', 'the cat sat on the \u1234'])
def test_probabilities_of_all_next_characters_sum_to_1(order, context):
    model = NGram(TEXT, order)
    ids = model.ids(code_points(context))
    prob = [model.probability(np.append(ids, i))[-1] for i in range(model.V)]
    assert sum(prob) == pytest.approx(1) and min(prob) > 0


def test_bigrams_by_hand():
    """A character counts by how many different characters come before it, not by how often it comes."""
    model = NGram('ababb', order=2)
    # bigrams ab 2, ba 1, bb 1; before a: b; before b: a and b. Once 2, twice 1: D = 2 / 4. Of one character: D = 1 / 3
    one = lambda n: (n - 1 / 3 + 1 / 3 * 2 / 3) / 3
    p = model.probability(model.ids(code_points('ab')))
    assert p == pytest.approx([one(1), (2 - 0.5 + 0.5 * 1 * one(2)) / 2])
    assert model.probability(model.ids(code_points('bb')))[1] == pytest.approx((1 - 0.5 + 0.5 * 2 * one(2)) / 2)


def test_text_like_the_training_text_is_likelier():
    model = NGram(TEXT, order=5)
    shuffled = ''.join(random.Random(0).sample(TEXT, len(TEXT)))
    assert model.nll('the rat sat on the cat. ') < 1 < model.nll(shuffled[:24]) < model.nll('\u1234' * 24)


def test_a_large_vocabulary_shortens_the_order():
    model = NGram(''.join(map(chr, range(100, 3100))) * 2, order=8)
    assert model.order == 5 and model.V ** model.order < 2 ** 63


def test_the_error_of_a_mean_over_a_grid():
    """A slope is no error: 400 means of 100 noisy values along one vary as the error says, not as a sample's would."""
    noise = np.random.default_rng(0).normal(0, 0.1, (400, 100))
    values = 5 * np.linspace(0, 1, 100) + noise
    errors = np.array([metrics.grid_error(row.tolist()) for row in values])
    assert values.mean(1).std() == pytest.approx(errors.mean(), rel=0.15) and errors.mean() < 0.1 * metrics.mean_error(
        values[0].tolist())[1]
    assert metrics.grid_error([1.0, 3.0]) == 1.0 and metrics.grid_error([1.0]) == 0.0
