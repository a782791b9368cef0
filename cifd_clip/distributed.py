"""The processes that share a global batch, and the gather that contrastive losses need.

Shapes: b rows of this rank, B rows of the global batch, D embedding dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cifd_clip.losses import Features, Logits, contrastive_loss

#: Values of a matrix of logits that is made as a whole.
LOGITS = 1 << 26


@dataclass(frozen=True)
class World:
    """This process's place among those that share a global batch.

    Contrastive terms compare local rows with gathered columns and send gradients back through
    the gather (OpenCLIP's ``--local-loss --gather-with-grad``): the mean over ranks of the
    gradients is then the gradient of the whole batch.
    """

    rank: int = 0
    size: int = 1

    def gather(self, rows: Tensor) -> Tensor:
        """(b, D) of every rank, concatenated in rank order: (B, D)."""
        if self.size == 1:
            return rows
        return _Gather.apply(rows, self.rank, self.size)

    def columns(self, features: Features) -> Features:
        """The same features with the rows of every rank."""
        return features.map(self.gather)

    def logits(self, features: Features, columns: Features | None = None) -> Logits:
        """Similarities of the local rows with the global batch, scaled and biased.

        Args:
            features: the rows, their scale and bias.
            columns: what they are compared with, gathered; by default the features' own.
        """
        columns = self.columns(features) if columns is None else columns
        logits = Logits(
            features.logit_scale * features.image @ columns.text.t(),
            features.logit_scale * features.text @ columns.image.t(),
        )
        if features.logit_bias is None:
            return logits
        return Logits(*(values + features.logit_bias for values in logits))

    def labels(self, features: Features) -> Tensor:
        """(b,) column of each local row's own pair."""
        rows = len(features.image)
        return torch.arange(rows, device=features.image.device) + rows * self.rank

    def contrastive(
        self,
        features: Features,
        columns: Features | None = None,
        loss: Callable[[Logits, Tensor], Tensor] = contrastive_loss,
    ) -> Tensor:
        """A contrastive loss of this rank's rows; see `over_rows`."""
        (value,) = self.over_rows(
            lambda labels, logits: (loss(logits, labels),), [features], columns and [columns]
        )
        return value

    def over_rows(
        self,
        losses: Callable[..., tuple[Tensor, ...]],
        rows: Sequence[Features],
        columns: Sequence[Features] | None = None,
    ) -> tuple[Tensor, ...]:
        """Losses of logits, each a mean over this rank's rows.

        Where (b, B) logits are more than `LOGITS` values, they are made of some rows at a time, and
        anew in backward: a global batch of 32,768 on one GPU would be ten matrices of 4 GiB.

        Args:
            losses: of the labels and the logits of each of ``rows``.
            rows: features of the local rows.
            columns: what each of them is compared with, gathered; by default their own.
        """
        columns = columns or [self.columns(features) for features in rows]
        labels, count = self.labels(rows[0]), len(rows[0].image)

        def of(start: int, stop: int) -> tuple[Tensor, ...]:
            few = (f.map(lambda x: x[start:stop]) for f in rows)
            return losses(labels[start:stop], *map(self.logits, few, columns))

        at_once = max(1, LOGITS // len(columns[0].image))
        if at_once >= count:
            return losses(labels, *map(self.logits, rows, columns))
        parts = [
            (
                checkpoint(of, start, stop, use_reentrant=False, preserve_rng_state=False),
                (stop - start) / count,
            )
            for start in range(0, count, at_once)
            for stop in [min(start + at_once, count)]
        ]
        return tuple(sum(part[i] * share for part, share in parts) for i in range(len(parts[0][0])))


class _Gather(torch.autograd.Function):
    """All ranks' rows; backward gives each rank the sum of all ranks' gradients of its rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, rank: int, size: int) -> Tensor:
        ctx.rank, ctx.rows = rank, len(rows)
        gathered = rows.new_empty(size * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        if dist.get_backend() == "nccl":
            mine = grad.new_empty(ctx.rows, *grad.shape[1:])
            dist.reduce_scatter_tensor(mine, grad.contiguous())
        else:  # gloo has no reduce-scatter in the older versions of torch
            whole = grad.contiguous().clone()
            dist.all_reduce(whole)
            mine = whole.narrow(0, ctx.rank * ctx.rows, ctx.rows)
        return mine, None, None
