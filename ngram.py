"""The second evaluator: an interpolated Kneser-Ney model of characters, which shares nothing with the neural ones.

    model = NGram(train_text)
    nats = model.nll(text)

A text gains nothing here by pleasing a transformer. It sees five characters back and says nothing about longer ones.

References: Kneser and Ney 1995, https://doi.org/10.1109/ICASSP.1995.479394
Chen and Goodman 1999, section 2.7 for the interpolated form, https://doi.org/10.1006/csla.1999.0128
"""
import math

import numpy as np


class NGram:
    """Probability of a character given up to order - 1 characters before it.

    The longest grams are counted as they occur; a shorter one by how many characters precede it in the text, so that a
    character common after one context alone stays rare elsewhere. From every count that order's discount D is taken and
    given to the next shorter order, and at last to the uniform distribution over the vocabulary: the text's characters
    and one id for all others. V ** order has to fit into 63 bits, so a large vocabulary shortens the order.
    """

    def __init__(self, text, order=6):
        codes = code_points(text)
        self.chars = np.unique(codes)
        self.V = len(self.chars) + 1
        self.order = max(1, min(order, len(text), int(63 / math.log2(self.V))))
        self.levels = []    # from the longest grams to single characters
        for k in range(self.order, 0, -1):
            if k == self.order:
                grams, counts = np.unique(self.grams(self.ids(codes), k), return_counts=True)
            else:    # distinct longer grams, the first character cut off
                grams, counts = np.unique(grams % self.V ** k, return_counts=True)
            self.levels.append(Level(grams, counts, self.V))
        self.levels.reverse()

    def ids(self, codes):
        """Code points (N,) -> ids (N,) int64 in 0..V - 1; V - 1 for a character that the training text lacks."""
        at = np.searchsorted(self.chars, codes).clip(max=self.V - 2)
        return np.where(self.chars[at] == codes, at, self.V - 1)

    def grams(self, ids, k):
        """The k-grams of ids (N,) as numbers in base V, (N - k + 1,) int64."""
        n = len(ids) - k + 1
        grams = np.zeros(max(0, n), np.int64)
        for i in range(k if n > 0 else 0):
            grams = grams * self.V + ids[i:i + n]
        return grams

    def probability(self, ids):
        """Probability of each of ids (N,) given those before it, (N,) float64."""
        prob = np.full(len(ids), 1 / self.V)
        for k, level in enumerate(self.levels, 1):
            prob[k - 1:] = level.interpolate(self.grams(ids, k), prob[k - 1:])
        return prob

    def nll(self, text):
        """Mean negative log-likelihood of the text's characters but the first, nats per character."""
        return -np.log(self.probability(self.ids(code_points(text)))[1:]).mean()


class Level:
    """The grams of one length: sorted numbers, their counts, and for each context the sum and number of its grams."""

    def __init__(self, grams, counts, V):
        self.grams, self.counts, self.V = grams, counts, V
        self.contexts, start, self.kinds = np.unique(grams // V, return_index=True, return_counts=True)
        self.totals = np.add.reduceat(counts, start)
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        # the estimate of Ney, Essen and Kneser; kept off 0, where an unseen character would be impossible
        self.discount = np.clip(once / max(1, once + 2 * twice), 0.1, 0.9)

    def interpolate(self, grams, shorter):
        """Probability of grams (N,) at this length, given that at the next shorter one, (N,)."""
        total, kinds = find(self.contexts, grams // self.V, self.totals, self.kinds)
        count, = find(self.grams, grams, self.counts)
        prob = (np.maximum(count - self.discount, 0) + self.discount * kinds * shorter) / np.maximum(total, 1)
        return np.where(total > 0, prob, shorter)


def find(keys, wanted, *values):
    """values of the wanted (N,) among sorted keys, 0 where there is none."""
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return [np.where(keys[at] == wanted, value[at], 0) for value in values]


def code_points(text):
    """Unicode code points of text, (N,) uint32."""
    return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
