"""CIDEr-D (Vedantam et al. 2015), as `cider_scorer.py` of pycocoevalcap computes it; tables multiply it by 100.

pycocoevalcap first has captions tokenised by Stanford's Java program. `tokens` does what that does to captions: lower case,
contractions and possessives apart ("don't" -> do n't, "dog's" -> dog 's), hyphened words whole, punctuation left away. It was
written for English captions; what it does not know of the Penn Treebank's rules (abbreviations such as "Mr.", fractions) it
splits at the punctuation.
"""

from __future__ import annotations

import math
import re
from collections import Counter

from vlm_jax.evaluation.metrics import METRICS

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the penalty for another length

# A contraction is cut before "n't", "'s", "'re" and their like; "cannot" is two words; numbers keep their points and commas.
_WORD = re.compile(r"can(?=not\b)|\w+?(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b|\d+(?:[.,:/]\d+)+|(?:[a-z]\.){2,}|\w+(?:[-/]\w+)*")

Grams = Counter[tuple[str, ...]]
Weights = list[dict[tuple[str, ...], float]]  # of the n-grams of each n


@METRICS.add("cider")
def cider(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """The mean over the pictures."""
    each = cider_of_each(predictions, references)
    return {"cider": math.fsum(each) / max(len(each), 1)}


def cider_of_each(predictions: list[str], references: list[list[str]]) -> list[float]:
    """The CIDEr-D of every picture. How rare an n-gram is, the references of all pictures say: of a single one all are 0."""
    right = [[grams(text) for text in texts] for texts in references]
    seen: Counter[tuple[str, ...]] = Counter(gram for texts in right for gram in set().union(*texts))
    log_pictures = math.log(max(len(right), 1))
    rarity = lambda gram: log_pictures - math.log(max(1, seen[gram]))

    def weighed(of: Grams) -> tuple[Weights, list[float], int]:
        weights: Weights = [{} for _ in range(LONGEST)]
        for gram, count in of.items():
            weights[len(gram) - 1][gram] = count * rarity(gram)
        norms = [math.sqrt(sum(value * value for value in part.values())) for part in weights]
        # The reference counts bigrams where the paper counts words.
        return weights, norms, sum(count for gram, count in of.items() if len(gram) == 2)

    def likeness(one: tuple[Weights, list[float], int], other: tuple[Weights, list[float], int]) -> float:
        penalty = math.exp(-((one[2] - other[2]) ** 2) / (2 * SIGMA**2))
        total = 0.0
        for mine, its, norm in zip(one[0], other[0], (a * b for a, b in zip(one[1], other[1], strict=True)), strict=True):
            if norm:
                total += sum(min(value, its[gram]) * its[gram] for gram, value in mine.items() if gram in its) / norm
        return 10 * penalty * total / LONGEST

    found = []
    for text, texts in zip(predictions, right, strict=True):
        said = weighed(grams(text))
        found.append(sum(likeness(said, weighed(one)) for one in texts) / max(len(texts), 1))
    return found


def tokens(caption: str) -> list[str]:
    """ "A dog's ball, isn't it?" -> a dog 's ball is n't it"""
    return _WORD.findall(caption.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))


def grams(caption: str) -> Grams:
    """All n-grams of 1 to 4 words."""
    words = tokens(caption)
    return Counter(tuple(words[at : at + n]) for n in range(1, LONGEST + 1) for at in range(len(words) - n + 1))
