"""How towers are computed: the same functions of the same weights, in fewer kernels."""

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import Attention, ResidualAttentionBlock, Transformer
from torch import Tensor, nn


class _CustomAttention(Attention):
    """The attention of OpenCLIP's custom blocks, with the weights and in the place of torch's.

    The stock block stays around it: OpenCLIP 3.3 can't checkpoint its custom one, which it gives
    arguments that the block does not take.
    """

    def __init__(self, stock: nn.MultiheadAttention):
        with torch.device("meta"):  # draws no weights: they are the stock module's
            super().__init__(stock.embed_dim, stock.num_heads)
        self.in_proj_weight, self.in_proj_bias = stock.in_proj_weight, stock.in_proj_bias
        self.out_proj = stock.out_proj
        self.train(stock.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options
    ) -> tuple[Tensor]:
        """Self-attention of (b, tokens, width): ``key`` and ``value`` are the ``query``."""
        return (super().forward(query, attn_mask),)


def use_custom_blocks(model: nn.Module) -> None:
    """Let OpenCLIP's own ViT and text towers attend as its ``block_type: custom`` does.

    Weights, their names and their order stay, outputs agree within rounding. torch's module copies
    the projections, adds their bias apart and fills gradients with zeros: on a GPU a step takes a
    quarter longer. Other towers (timm's, Hugging Face's, ResNets) are left as they are.
    """
    for block in model.modules():
        stock = isinstance(block, ResidualAttentionBlock) and block.attn
        if isinstance(stock, nn.MultiheadAttention) and not hasattr(block, "ln_1_kv"):
            block.attn = _CustomAttention(stock)


def compile_towers(model: nn.Module) -> None:
    """Compile a model's towers in place.

    Where OpenCLIP checkpoints a tower's blocks they are compiled one by one (all share a graph), so
    that checkpointing stays outside of what is compiled.
    """
    for module in model.modules():
        if isinstance(module, Transformer):
            # dynamic=False: both towers' lengths as they are, not one graph for all
            for part in module.resblocks if module.grad_checkpointing else (module,):
                part.compile(dynamic=False)
        elif isinstance(module, TimmModel):
            module.trunk.compile()
        elif isinstance(module, HFTextEncoder):
            module.transformer.compile()
        elif isinstance(module, ModifiedResNet):
            module.compile()
