"""Small statistics."""
import math
import operator
from collections import Counter


def interval(successes, n, z=1.96):
    """95 % interval of a proportion (Wilson 1927): never leaves [0, 1], good for small n."""
    p, centre = successes / n, (successes + z * z / 2) / (n + z * z)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def win_rate(scores, against):
    """Share of pairs in which the first scores higher; a tie is half a win. -> rate, low, high"""
    wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(scores, against, strict=True))
    return wins / len(scores), *interval(wins, len(scores))


def kappa(first, second):
    """Cohen's kappa of two lists of choices between the same things (Cohen 1960): (p - e) / (1 - e)
    with p the share that is alike, and e what it would be by chance, as each list has its choices
    in its own proportions. NaN where e is 1, as both always chose the same. -> kappa, low, high

    The interval is the one of p, with e taken as known.
    """
    n, counts = len(first), Counter(second)
    e = sum(k * counts[choice] for choice, k in Counter(first).items()) / n**2
    alike = sum(map(operator.eq, first, second))
    return tuple((p - e) / (1 - e) if e < 1 else math.nan
                 for p in (alike / n, *interval(alike, n)))


def distinct(texts, n):
    """Share of distinct n-grams of words: low where all texts are alike (Li et al. 2016)."""
    grams = Counter(gram for text in texts for gram in zip(*(text.split()[i:] for i in range(n))))
    return len(grams) / max(1, grams.total())


def accuracy_of(margin):
    """Share of pairs whose first score is higher; a tie is half right. (B,) -> scalar"""
    return (1 + margin.sign()).mean() / 2


def disagreement(margins):
    """How far models differ on pairs: the deviation over them of P(the first answer is better), as
    in Christiano et al. 2017, section 2.2.4. margins: score of first - second, (models, B) -> (B,)
    """
    return margins.sigmoid().std(0)


def standardise(scores):
    """Shift and scale a tensor to mean 0, deviation 1 -> floats. In float32 equal scores would
    differ from their mean by a last digit, and become about 1."""
    scores = scores.cpu().double()
    return ((scores - scores.mean()) / (scores.std(correction=0) + 1e-8)).tolist()
