"""OpenCLIP's cleaning of captions for those who have no OpenCLIP: the model card shows this code.

A tokenizer's files don't hold it, and without it common captions become other tokens: typographic
quotes, HTML entities, ligatures, full-width letters, text in a wrong encoding. Each function stands
alone beside ``import html`` and ``import ftfy``.
"""

import html
from collections.abc import Callable

import ftfy


def clean_lower(caption: str) -> str:
    """Mend the encoding, resolve HTML entities; single spaces, lower case."""
    caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return " ".join(caption.split()).lower()


def clean_whitespace(caption: str) -> str:
    """Mend the encoding, resolve HTML entities; single spaces."""
    caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return " ".join(caption.split())


def clean_canonicalize(caption: str) -> str:
    """Mend the encoding, resolve HTML entities; no punctuation, single spaces, lower case."""
    caption = html.unescape(html.unescape(ftfy.fix_text(caption))).replace("_", " ")
    punctuation = r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~"""
    caption = caption.translate(str.maketrans("", "", punctuation))
    return " ".join(caption.lower().split())


#: By OpenCLIP's names in ``tokenizer_kwargs``.
CLEAN: dict[str, Callable[[str], str]] = {
    "lower": clean_lower,
    "whitespace": clean_whitespace,
    "canonicalize": clean_canonicalize,
}
