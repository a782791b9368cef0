"""A student's tokenizer as Hugging Face files, which need no OpenCLIP."""

import copy
from collections.abc import Callable
from pathlib import Path

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor

from cifd_clip.export.captions import CLEAN
from cifd_clip.export.source import Source


def save_tokenizer(source: Source, folder: Path) -> None:
    """Write the tokenizer of ``source`` as ``tokenizer.json`` and ``tokenizer_config.json``.

    The files do not clean captions, which OpenCLIP does first: see `clean_name`. OpenCLIP's
    byte-pair encoding becomes a ``CLIPTokenizer``: the same ids of a cleaned caption up to the end
    of text. Behind it OpenCLIP pads with 0 and this with the end of text again: id 0 is "!", which
    as a padding token would be cut out of captions. Only a causal text tower that is read at the
    end of text does not look there; multiplying by the attention mask gives OpenCLIP's zeros.
    """
    if pads_with_zeros(source):
        tokenizer = clip_tokenizer(source.tokenizer, source.context_length)
    else:
        tokenizer = copy.deepcopy(source.tokenizer.tokenizer)
        # OpenCLIP says the length at each call; the files' own may be another, or none.
        tokenizer.model_max_length = source.context_length
    tokenizer.save_pretrained(folder)


def read_tokenizer(folder: Path, clean: str, zeros: bool = False) -> Callable[[list[str]], Tensor]:
    """The tokenizer that was written to ``folder``, called as the model card's code calls it.

    Args:
        folder: with its files.
        clean: which of `captions.CLEAN` goes before it, see `clean_name`.
        zeros: whether it multiplies by the attention mask, as the card does for `pads_with_zeros`.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}

    def tokenize(captions: list[str]) -> Tensor:
        tokens = tokenizer([CLEAN[clean](caption) for caption in captions], **options)
        ids = tokens["input_ids"]
        return ids * tokens["attention_mask"] if zeros else ids

    return tokenize


def pads_with_zeros(source: Source) -> bool:
    """Whether 0 stands behind the student's texts; Hugging Face files name their own padding."""
    return not isinstance(source.tokenizer, HFTokenizer)


def clean_name(source: Source) -> str:
    """Which of `captions.CLEAN` the student's tokenizer applies."""
    default = "lower" if isinstance(source.tokenizer, SimpleTokenizer) else "whitespace"
    return (source.text_config.get("tokenizer_kwargs") or {}).get("clean", default)


def clip_tokenizer(tokenizer: SimpleTokenizer, context_length: int):
    """``transformers.CLIPTokenizer`` with the vocabulary and merges of OpenCLIP's tokenizer."""
    from transformers import CLIPTokenizer

    special = {tokenizer.sot_token_id: "<|startoftext|>", tokenizer.eot_token_id: "<|endoftext|>"}
    return CLIPTokenizer(
        vocab={special.get(id_, token): id_ for token, id_ in tokenizer.encoder.items()},
        merges=list(tokenizer.bpe_ranks),
        model_max_length=context_length,
    )
