"""A student's tokenizer as Hugging Face files, which need no OpenCLIP."""

from pathlib import Path

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from cifd_clip.export.source import Source


def save_tokenizer(source: Source, folder: Path) -> None:
    """Write the tokenizer of ``source`` as ``tokenizer.json`` and ``tokenizer_config.json``.

    OpenCLIP's byte-pair encoding becomes a ``CLIPTokenizer``: the same ids up to the end of text;
    behind it OpenCLIP pads with 0 and this with the end of text again, where a causal text tower
    does not look.
    """
    if isinstance(source.tokenizer, HFTokenizer):
        source.tokenizer.save_pretrained(folder)
    else:
        clip_tokenizer(source.tokenizer, source.context_length).save_pretrained(folder)


def clip_tokenizer(tokenizer: SimpleTokenizer, context_length: int):
    """``transformers.CLIPTokenizer`` with the vocabulary and merges of OpenCLIP's tokenizer."""
    from transformers import CLIPTokenizer

    special = {tokenizer.sot_token_id: "<|startoftext|>", tokenizer.eot_token_id: "<|endoftext|>"}
    return CLIPTokenizer(
        vocab={special.get(id_, token): id_ for token, id_ in tokenizer.encoder.items()},
        merges=list(tokenizer.bpe_ranks),
        model_max_length=context_length,
    )
