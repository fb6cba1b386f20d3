"""How VQA normalises answers before they are compared (`vqaEval.py` of GT-Vision-Lab/VQA; Antol et al. 2015)."""

from __future__ import annotations

import re

PUNCTUATION = [*';/[]"{}()=+\\_-><@`,?!']
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")  # as the reference has it, "!<=" included: every period that no digit follows
MOST_PERIODS = 32  # the reference passes re.UNICODE, which is 32, as the number of substitutions
_NUMBERS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS.split())}
ARTICLES = {"a", "an", "the"}

_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
"""
# Each spelling that leaves one apostrophe out.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in _CONTRACTED.split() for place, mark in enumerate(word) if mark == "'"
} | {"somebody'd": "somebodyd"}  # as the reference has it


def flat(text: str) -> str:
    """On one line, without white space around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalised(text: str) -> str:
    """ "The  Dog's" -> "dog's", "10,000" -> "10000", "U.S.A." -> "usa", "dont know" -> "don't know", "two" -> "2"."""
    return without_articles(without_punctuation(flat(text)))


def without_punctuation(text: str) -> str:
    out = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or COMMA_IN_NUMBER.search(text) else " ")
    return PERIOD.sub("", out, count=MOST_PERIODS)


def without_articles(text: str) -> str:
    """Lower case, numbers as digits, no articles, contractions with their apostrophes."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
