"""What samples and scores are worth: diversity, words, distance from real text, repetition; rank statistics of a score.

Likelihood alone is easily gamed by low entropy (https://arxiv.org/abs/2604.02718), so every likelihood stands beside
the diversity of the same samples. Words follow informed correctors, https://arxiv.org/abs/2407.21243. Standard errors
are the jackknife's: a measure is taken again without each of 16 groups of samples.
"""
import math
import re
from dataclasses import dataclass

import numpy as np

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
GROUPS = 16          # of the jackknife
POOL = 8192          # characters whose distinct 4-grams are counted: their share falls with length, so that is fixed
LONG = 20            # characters; an n-gram of this length that comes twice is a copy, not chance


# -----------------------------------------------------------------------------
# rank statistics

def area_under_roc(truth, score):
    """Chance that a random true one has a higher score than a random false one, ties counting half.

    truth (N,) bool or 0 and 1, score (N,) float, tensors or arrays -> float; nan where all are of one kind.
    """
    truth, score = as_array(truth) > 0, as_array(score)
    if truth.all() or not truth.any():
        return math.nan
    from scipy.stats import mannwhitneyu    # two thirds of a second, which sample_simple.py need not wait for
    pairs = truth.sum() * (~truth).sum()
    return float(mannwhitneyu(score[truth], score[~truth], method='asymptotic').statistic / pairs)


def rank_correlation(a, b):
    """Spearman's rank correlation of a, b (N,), ties sharing their mean rank -> float; nan where one is constant."""
    a, b = as_array(a), as_array(b)
    if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
        return math.nan
    from scipy.stats import spearmanr
    return float(spearmanr(a, b).statistic)


def as_array(x):
    """A tensor of any dtype, or a sequence of numbers, as float64 (N,)."""
    return np.asarray(x.detach().cpu().double() if hasattr(x, 'detach') else x, np.float64)


# -----------------------------------------------------------------------------
# standard errors

def mean_error(values):
    """Mean of values and its standard error."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)


def grid_error(values):
    """Standard error of the mean of values in the order of a grid, each of which was drawn at one of its places.

    It comes from successive differences, for what changes along the grid is no error of the mean: Wolter, Introduction
    to Variance Estimation, 2007, chapter 8.
    """
    squares = [(b - a) ** 2 for a, b in zip(values, values[1:])]
    return math.sqrt(sum(squares) / 2 / max(1, len(squares)) / len(values))


def leave_out(n):
    """Indices of n samples without those of one group, for each of the jackknife's groups in turn."""
    groups = min(GROUPS, n)
    return [[i for i in range(n) if i % groups != g] for g in range(groups)]


def jackknife_error(replicates):
    """Standard error of a measure from its values without each group of samples (G,)."""
    groups, mean = len(replicates), sum(replicates) / len(replicates)
    return math.sqrt((groups - 1) / groups * sum((v - mean) ** 2 for v in replicates))


# -----------------------------------------------------------------------------
# measures of a set of texts

def words_of(text):
    return WORD.findall(text)


def whole_words(text):
    """Words of a sample that its two ends do not cut."""
    found = list(WORD.finditer(text))
    return [m.group() for m in found if m.start() > 0 and m.end() < len(text)]


def in_vocabulary(texts, vocabulary):
    """Share of whole words that are in vocabulary; 0 where there are none."""
    words = [word for text in texts for word in whole_words(text)]
    return sum(word in vocabulary for word in words) / max(1, len(words))


def hashes(text, n):
    """One number for each n-gram of text, equal for equal n-grams, (len(text) - n + 1,) uint64.

    A polynomial of the scrambled characters modulo 2^64: among a million n-grams some two share a number with a chance
    of about 3e-8.
    """
    codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32).astype(np.uint64) + np.uint64(1)
    codes = codes * np.uint64(0x9E3779B97F4A7C15)
    codes = (codes ^ (codes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    codes ^= codes >> np.uint64(32)
    size = max(0, len(codes) - n + 1)
    result = np.zeros(size, np.uint64)
    for i in range(n if size else 0):
        result = result * np.uint64(0x94D049BB133111EB) + codes[i:i + size]
    return result


def entropy(counts):
    """Entropy of counts (N,), nats."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def unigram_entropy(grams):
    """Entropy of the characters of all texts, nats: grams [(n_i,)], the 1-grams of each text."""
    return entropy(np.unique(np.concatenate(grams), return_counts=True)[1])


def distinct_ngrams(grams, pool):
    """Share of distinct n-grams among those of pool samples, averaged over every choice of pool of the samples.

    grams [(n_i,)], the n-grams of each text; pool int, at most their number. Every sample counts alike, however many
    there are. An n-gram that k of N samples hold is missed by a choice with the chance C(N - k, pool) / C(N, pool):
    rarefaction, Hurlbert 1971, https://doi.org/10.2307/1934145.
    """
    from scipy.special import gammaln
    N, total = len(grams), sum(map(len, grams))
    k = np.unique(np.concatenate([np.unique(g) for g in grams]), return_counts=True)[1]
    log_choices = lambda n: gammaln(n + 1) - gammaln(np.maximum(n - pool, 0) + 1)    # up to a factor pool!
    missed = np.where(N - k >= pool, np.exp(log_choices(N - k) - log_choices(N)), 0.0)
    return float((1 - missed).sum() / max(1, total * pool / N))


def pool_size(texts):
    """How many samples make about POOL characters, and no more than the jackknife leaves when it drops a group."""
    n = len(texts)
    length = max(1, sum(map(len, texts)) // n)
    return max(1, min(POOL // length, n - math.ceil(n / min(GROUPS, n))))


def divergence(grams, others):
    """Jensen-Shannon divergence of the n-grams of two sets of texts, nats, 0 to log 2: grams, others [(n_i,)]."""
    ids, at = np.unique(np.concatenate([*grams, *others]), return_inverse=True)
    cut = sum(map(len, grams))
    a, b = (np.bincount(part, minlength=len(ids)) for part in (at[:cut], at[cut:]))
    a, b = a / a.sum(), b / b.sum()
    return entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2


def repeated_within(grams):
    """Share of n-grams that came before in their own text: grams [(n_i,)]."""
    return sum(len(g) - len(np.unique(g)) for g in grams) / max(1, sum(map(len, grams)))


def repeated_across(grams):
    """Share of n-grams that another text holds too: grams [(n_i,)]."""
    ids, held = np.unique(np.concatenate([np.unique(g) for g in grams]), return_counts=True)
    all_grams = np.concatenate(grams)
    return float((held[np.searchsorted(ids, all_grams)] > 1).mean()) if len(all_grams) else 0.0


def share_found(grams, known):
    """Share of n-grams among the known, sorted ones: grams [(n_i,)], known (M,)."""
    all_grams = np.concatenate(grams)
    if not len(all_grams) or not len(known):
        return 0.0
    at = np.searchsorted(known, all_grams).clip(max=len(known) - 1)
    return float((known[at] == all_grams).mean())


# -----------------------------------------------------------------------------
# all of them

@dataclass
class Reference:
    """Real text that samples are held against."""
    vocabulary: set         # words of the training text
    memory: np.ndarray      # hashes of its LONG-grams, sorted
    held_out: list          # texts, of the samples' number and length

    @classmethod
    def of(cls, train, held_out):
        """train: the training text; held_out: texts that no one was trained on."""
        return cls(set(words_of(train)), np.unique(hashes(train, LONG)), held_out)


def measures(texts, reference):
    """Functions of a list of indices into texts, {name: function}; the n-grams are hashed once."""
    grams = {n: [hashes(text, n) for text in texts] for n in (1, 2, 3, 4, 5, LONG)}
    real = {n: [hashes(text, n) for text in reference.held_out] for n in range(1, 6)}
    pool = pool_size(reference.held_out)    # one for all that are compared: it goes by the length of texts
    pick = lambda n, kept: [grams[n][i] for i in kept]
    return {
        'entropy': lambda kept: unigram_entropy(pick(1, kept)),
        'distinct4': lambda kept: distinct_ngrams(pick(4, kept), pool),
        'in_vocabulary_words': lambda kept: in_vocabulary([texts[i] for i in kept], reference.vocabulary),
        'divergence': lambda kept: sum(divergence(pick(n, kept), real[n]) for n in real) / len(real),
        'repeated_within': lambda kept: repeated_within(pick(LONG, kept)),
        'repeated_across': lambda kept: repeated_across(pick(LONG, kept)),
        'in_training_text': lambda kept: share_found(pick(LONG, kept), reference.memory),
    }


def describe(texts, scores, reference):
    """Every measure of a set of texts, {name: {'value', 'error' (standard), 'replicates' [GROUPS] of the jackknife}}.

    scores {name: one number for each text}, whose mean is the measure; reference: a Reference.
    """
    mean = lambda values: lambda kept: sum(values[i] for i in kept) / len(kept)
    result, every = {}, range(len(texts))
    for name, measure in ({name: mean(values) for name, values in scores.items()} | measures(texts, reference)).items():
        replicates = [measure(kept) for kept in leave_out(len(texts))]
        result[name] = {'value': measure(every), 'error': jackknife_error(replicates), 'replicates': replicates}
    return result
