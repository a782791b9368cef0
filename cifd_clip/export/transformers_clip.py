"""transformers' CLIP format, for the students it has a place for: a ViT and a causal text tower.

``CLIPModel`` is the original CLIP: pre-norm blocks without LayerScale, a class token that is
normalised before the first block and after the last, the text read at the end-of-text token, linear
projections without bias, no logit bias.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from open_clip.tokenizer import HFTokenizer
from open_clip.transformer import (
    QuickGELU,
    ResidualAttentionBlock,
    TextTransformer,
    VisionTransformer,
)
from torch import Tensor, nn

from cifd_clip.export.source import Source, Towers
from cifd_clip.export.tokenizer import clean_name, read_tokenizer, save_tokenizer
from cifd_clip.files import write_tensors


def write_transformers(source: Source, folder: Path) -> Towers:
    """``config.json``, safetensors, image processor and tokenizer for ``CLIPModel``.

    Raises:
        ValueError: naming the first layer that ``CLIPModel`` lacks.
    """
    from transformers import CLIPModel

    if misfit := next(misfits(source), None):
        raise ValueError(
            f"--format transformers: CLIPModel has no place for {source.name}: {misfit}; "
            "use --format open_clip or onnx"
        )
    _config(source).save_pretrained(folder)
    write_tensors(folder / "model.safetensors", _tensors(source.model), {"format": "pt"})
    _image_processor(source).save_pretrained(folder)
    save_tokenizer(source, folder)

    model = CLIPModel.from_pretrained(folder).eval()

    def image(images: Tensor) -> Tensor:
        features = model.visual_projection(model.vision_model(images).pooler_output)
        return nn.functional.normalize(features, dim=-1)

    def text(tokens: Tensor) -> Tensor:
        features = model.text_projection(model.text_model(tokens).pooler_output)
        return nn.functional.normalize(features, dim=-1)

    tokenizer = read_tokenizer(folder, clean_name(source))
    return Towers(torch.no_grad()(image), torch.no_grad()(text), tokenizer)


def misfits(source: Source) -> Iterator[str]:
    """What of the student ``CLIPModel`` can't hold, layer by layer."""
    model = source.model
    visual, text = model.visual, _text(model)
    if not isinstance(visual, VisionTransformer):
        yield f"visual is a {type(visual).__name__}, not OpenCLIP's VisionTransformer"
        return
    if hasattr(model, "text") and not isinstance(text, TextTransformer):
        yield f"text is a {type(text).__name__}, not OpenCLIP's TextTransformer"
        return
    height, width = visual.image_size
    patch_height, patch_width = visual.patch_size
    if height != width or patch_height != patch_width:
        yield f"visual.conv1 reads {height} x {width} images, not squares in square patches"
    if visual.attn_pool is not None or visual.pool_type != "tok":
        pool = "attention" if visual.attn_pool is not None else visual.pool_type
        yield f"visual pools by '{pool}', not by the class token"
    if isinstance(visual.ln_pre, nn.Identity):
        yield "visual.ln_pre, the LayerNorm before the first block, is missing"
    if visual.proj is None:
        yield "visual.proj is missing"
    yield from _block_misfits(visual.transformer.resblocks, "visual.transformer")
    yield from _block_misfits(text.transformer.resblocks, "text transformer")
    if getattr(text, "cls_emb", None) is not None or len(text.positional_embedding) != (
        text.context_length
    ):
        yield "the text tower appends a class token (embed_cls)"
    if text.attn_mask is None:
        yield "the text tower's attention is not causal (no_causal_mask)"
    yield from _pooling_misfits(source)
    projection = text.text_projection
    if projection is None or getattr(projection, "bias", None) is not None:
        yield "text_projection is " + ("missing" if projection is None else "a Linear with bias")
    if model.logit_bias is not None:
        yield "logit_bias"
    if source.preprocess["resize_mode"] == "longest":
        yield "its preprocessing pads images (resize_mode 'longest')"


def _block_misfits(blocks: nn.ModuleList, where: str) -> Iterator[str]:
    if type(blocks[0]) is not ResidualAttentionBlock:
        yield f"{where}.resblocks are {type(blocks[0]).__name__}s"
        return
    if not isinstance(blocks[0].ls_1, nn.Identity):
        yield f"{where}.resblocks scale their branches (LayerScale)"
    if _activation(blocks) is None:
        yield f"{where}.resblocks' activation is {blocks[0].mlp.gelu}, not a GELU it knows"
    if blocks[0].ln_1.weight is None or blocks[0].ln_1.bias is None:
        yield f"{where}'s LayerNorms have no weight or no bias"


def _pooling_misfits(source: Source) -> Iterator[str]:
    pool, eos = _pooling(source.model)
    own = not isinstance(source.tokenizer, HFTokenizer)
    if pool not in ("argmax", "eos"):
        yield f"the text tower pools by '{pool}', not at the end of text"
    elif pool == "argmax" and not own:
        yield "the text tower reads at the highest token id, which another tokenizer need not have"
    elif pool == "eos" and own and eos != source.tokenizer.eot_token_id:
        yield f"text_cfg.eos_id is {eos}, the tokenizer's is {source.tokenizer.eot_token_id}"
    elif pool == "eos" and eos == 2:
        yield "text_cfg.eos_id is 2, which CLIPTextModel takes for 'the highest token id'"
    if not own and source.tokenizer.tokenizer.padding_side != "right":
        yield "its tokenizer pads in front of the text, which the mask of CLIPTextModel hides"
    if own and source.text_config.get("tokenizer_kwargs"):
        yield f"its tokenizer has options: {source.text_config['tokenizer_kwargs']}"


def _text(model: nn.Module) -> nn.Module:
    """The module that holds the text tower: a ``CLIP`` holds its parts itself."""
    return getattr(model, "text", model)


def _pooling(model: nn.Module) -> tuple[str, int]:
    text = _text(model)
    if text is model:
        return model.text_pool_type, model.text_eos_id
    return text.pool_type, text.eos_id


def _activation(blocks: nn.ModuleList) -> str | None:
    """transformers' name of the blocks' activation."""
    layer = blocks[0].mlp.gelu
    if isinstance(layer, QuickGELU):
        return "quick_gelu"
    if isinstance(layer, nn.GELU):
        return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[layer.approximate]
    return None


def _config(source: Source):
    from transformers import CLIPConfig

    model = source.model
    visual, text = model.visual, _text(model)
    dim = visual.proj.shape[1]
    if isinstance(source.tokenizer, HFTokenizer):
        tokens = {
            "bos_token_id": source.tokenizer.tokenizer.bos_token_id,
            "eos_token_id": _pooling(model)[1],
            "pad_token_id": source.tokenizer.tokenizer.pad_token_id,
        }
    else:
        end = source.tokenizer.eot_token_id
        start = source.tokenizer.sot_token_id
        tokens = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    return CLIPConfig(
        vision_config={
            **_transformer_config(visual.transformer, visual.ln_post),
            "image_size": visual.image_size[0],
            "patch_size": visual.patch_size[0],
            "projection_dim": dim,
        },
        text_config={
            **_transformer_config(text.transformer, text.ln_final),
            **tokens,
            "vocab_size": text.token_embedding.num_embeddings,
            "max_position_embeddings": len(text.positional_embedding),
            "projection_dim": dim,
        },
        projection_dim=dim,
        logit_scale_init_value=math.log(1 / 0.07),
        architectures=["CLIPModel"],
        dtype="float32",
    )


def _transformer_config(transformer: nn.Module, last_norm: nn.LayerNorm) -> dict:
    block = transformer.resblocks[0]
    return {
        "hidden_size": block.attn.embed_dim,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": _activation(transformer.resblocks),
        "layer_norm_eps": last_norm.eps,
    }


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    visual, text = model.visual, _text(model)
    projection = text.text_projection
    linear = isinstance(projection, nn.Linear)
    tensors = {
        "logit_scale": model.logit_scale.reshape(()),
        "visual_projection.weight": visual.proj.T,
        "text_projection.weight": projection.weight if linear else projection.T,
        "vision_model.embeddings.class_embedding": visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": visual.positional_embedding,
        "text_model.embeddings.token_embedding.weight": text.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": text.positional_embedding,
        # transformers' own spelling
        **_layer("vision_model.pre_layrnorm", visual.ln_pre),
        **_layer("vision_model.post_layernorm", visual.ln_post),
        **_layer("text_model.final_layer_norm", text.ln_final),
    }
    for tower, transformer in (("vision", visual.transformer), ("text", text.transformer)):
        for i, block in enumerate(transformer.resblocks):
            tensors |= _block(f"{tower}_model.encoder.layers.{i}", block)
    return {name: tensor.clone() for name, tensor in tensors.items()}  # some share memory


def _block(name: str, block: ResidualAttentionBlock) -> dict[str, Tensor]:
    tensors = {
        **_layer(f"{name}.layer_norm1", block.ln_1),
        **_layer(f"{name}.layer_norm2", block.ln_2),
        **_layer(f"{name}.self_attn.out_proj", block.attn.out_proj),
        **_layer(f"{name}.mlp.fc1", block.mlp.c_fc),
        **_layer(f"{name}.mlp.fc2", block.mlp.c_proj),
    }
    for kind in ("weight", "bias"):
        parts = getattr(block.attn, f"in_proj_{kind}").chunk(3)
        tensors |= {f"{name}.self_attn.{p}_proj.{kind}": part for p, part in zip("qkv", parts)}
    return tensors


def _layer(name: str, layer: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}


def _image_processor(source: Source):
    # Where a centre crop leaves an odd margin, transformers rounds to the other side: one pixel.
    from transformers import CLIPImageProcessor

    preprocess = source.preprocess
    side, _ = source.image_size
    square = {"height": side, "width": side}
    squash = preprocess["resize_mode"] == "squash"
    return CLIPImageProcessor(
        size=square if squash else {"shortest_edge": side},
        do_center_crop=not squash,
        crop_size=square,
        # PIL's numbers; OpenCLIP reads 'random' as bicubic in evaluation
        resample=2 if preprocess["interpolation"] == "bilinear" else 3,
        image_mean=list(preprocess["mean"]),
        image_std=list(preprocess["std"]),
    )
