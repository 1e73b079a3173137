"""What samples are worth: likelihood under an evaluator, diversity, spelling; each with its standard error over samples.

Likelihood alone is easily gamed by low entropy (https://arxiv.org/abs/2604.02718), so every figure stands beside the
diversity of the same samples. Spelling follows informed correctors, https://arxiv.org/abs/2407.21243.
"""
import math
import re
from collections import Counter

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


def words_of(text):
    return WORD.findall(text)


def whole_words(text):
    """Words of a sample that its two ends do not cut."""
    found = list(WORD.finditer(text))
    return [m.group() for m in found if m.start() > 0 and m.end() < len(text)]


def unigram_entropy(texts):
    """Entropy of the characters of all texts, nats."""
    counts = Counter()
    for text in texts:
        counts.update(text)
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


def distinct_ngrams(texts, n=4, characters=8192):
    """Share of distinct n-grams among those of the first so many characters: it falls with length, so that is fixed."""
    grams, left = [], characters
    for text in texts:
        text = text[:left]
        left -= len(text)
        grams += [text[i:i + n] for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def spelling(texts, vocabulary):
    """Share of whole words that are in vocabulary, and share of the words' characters in words that are not."""
    words = [word for text in texts for word in whole_words(text)]
    unknown = [word for word in words if word not in vocabulary]
    letters = sum(map(len, words))
    return 1 - len(unknown) / max(1, len(words)), sum(map(len, unknown)) / max(1, letters)


def mean_error(values):
    """Mean of values and its standard error."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)


def jackknife_error(measure, texts, groups=16):
    """Standard error of a measure of a set of texts, by leaving out one of the groups of texts at a time."""
    groups = min(groups, len(texts))
    values = [measure([text for i, text in enumerate(texts) if i % groups != g]) for g in range(groups)]
    mean = sum(values) / groups
    return math.sqrt((groups - 1) / groups * sum((v - mean) ** 2 for v in values))


def describe(texts, nll, vocabulary):
    """Every measure of a set of texts, {name: [value, standard error]}.

    nll: mean negative log-likelihood of each text under the evaluator, nats per token; vocabulary: set of known words.
    """
    measures = {'entropy': unigram_entropy, 'distinct4': distinct_ngrams,
                'spelt': lambda t: spelling(t, vocabulary)[0], 'unknown_chars': lambda t: spelling(t, vocabulary)[1]}
    return {'nll': list(mean_error(nll))} | {name: [m(texts), jackknife_error(m, texts)] for name, m in measures.items()}
