"""Embeddings as the integers of an RDM's bottleneck, entropy-coded: a teacher cache by rate.

The RDM of a bank's highest rate is a codec: of an embedding X it keeps round(Y), and decodes X̂ from
it. What two machines must agree in is written once, `code.safetensors`: of each channel the least
integer, and the cumulative counts of those from there on by the bank's own density, out of 2²⁴, the
last for whatever lies outside (it follows the row, as 32 bits); and the decoder's weights. A range
coder of the library constriction reads each row by these counts alone. X̂ is computed in float64 and
rounded to float16, so that neither batch sizes nor processors show.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from cifd_clip import RDMBank
from cifd_clip.artefact import MODALITIES
from cifd_clip.files import file_hash, read_json, write_tensors
from cifd_clip.rdm import RateDistortionModules
from cifd_clip.teacher import weights_hash
from training.engine.run import bank_folder
from training.errors import Failure, UsageError

try:
    from constriction import stream
except ImportError as error:
    raise UsageError("--code-with needs constriction: pip install 'cifd_clip[code]'") from error

FILE = "code.safetensors"
TOTAL = 1 << 24  # constriction's own precision: counts are what it codes with, but for rounding
FARTHEST = 512  # integers that get a count of their own, at most
RAREST = 2.0**-16  # what is less likely lies outside
FAMILY, HALF = stream.model.Categorical(perfect=False), stream.model.Uniform(1 << 16)
SLAB = 4096  # rows whose bottleneck is computed together


@dataclass(frozen=True)
class Codec:
    """One modality's: integers (C,) of a row as words, and X̂ of integers.

    Args:
        low: (C,) each channel's least integer that has a count.
        counts: (C, S) of the integers from there on, the last of all others.
        decoder: weights and biases of the RDM's last two layers.
    """

    low: np.ndarray
    counts: np.ndarray
    decoder: tuple[Tensor, Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, tensors: dict[str, Tensor], modality: str) -> "Codec":
        """From what `tables` made."""
        low, cumulative, *decoder = (tensors[f"{modality}/{name}"] for name in NAMES)
        counts = np.diff(cumulative.numpy(), axis=1).astype(np.float64)  # exact
        return cls(low.numpy(), counts, tuple(w.double() for w in decoder))

    def encode(self, values: np.ndarray) -> np.ndarray:
        """(words,) uint32 of integers (C,)."""
        escape, symbols = self.counts.shape[1] - 1, values - self.low
        outside = (symbols < 0) | (symbols >= escape)
        outside |= self.counts[np.arange(len(values)), np.where(outside, 0, symbols)] == 0
        encoder = stream.queue.RangeEncoder()
        encoder.encode(np.where(outside, escape, symbols).astype(np.int32), FAMILY, self.counts)
        if outside.any():
            halves = values[outside].astype("<i4").view("<u2").astype(np.int32)
            encoder.encode(halves, HALF)
        return encoder.get_compressed()

    def decode(self, words: np.ndarray) -> np.ndarray:
        """Integers (C,) of a row's words."""
        decoder = stream.queue.RangeDecoder(words)
        symbols = decoder.decode(FAMILY, self.counts)
        values, outside = symbols + self.low, symbols == self.counts.shape[1] - 1
        if outside.any():
            halves = decoder.decode(HALF, 2 * int(outside.sum()))
            values[outside] = halves.astype("<u2").view("<i4")
        return values

    def embed(self, values: np.ndarray) -> np.ndarray:
        """X̂ at unit norm, (n, T) float16, of integers (n, C)."""
        hidden, hidden_bias, last, last_bias = self.decoder
        rows = torch.from_numpy(values).double()
        rows = F.relu(rows @ hidden + hidden_bias) @ last + last_bias
        return F.normalize(rows, dim=-1).half().numpy()


#: Of the tensors in `FILE`, of each modality.
NAMES = ("low", "cumulative", "hidden", "hidden_bias", "last", "last_bias")


def tables(modules: RateDistortionModules, module: int) -> dict[str, Tensor]:
    """What decoding needs of one of the RDMs of a modality."""
    channels = slice(module * modules.channels, (module + 1) * modules.channels)
    # Likelihoods of integers, and those that get a count.
    grid = torch.arange(-FARTHEST, FARTHEST + 1)
    values = grid[:, None].float().expand(-1, modules.density.channels)
    likely = modules.density(values.to(modules.weights[0].device)).neg().exp()[:, channels]
    likely = likely.t().double().cpu().numpy()
    kept = likely >= np.minimum(RAREST, likely.max(axis=1, keepdims=True))
    first = kept.argmax(axis=1)
    width = kept.shape[1] - kept[:, ::-1].argmax(axis=1) - first
    place = first[:, None] + np.arange(width.max())
    inside = np.arange(width.max()) < width[:, None]
    likely = np.take_along_axis(likely, np.minimum(place, likely.shape[1] - 1), 1) * inside
    outside = np.maximum(1 - likely.sum(axis=1, keepdims=True), RAREST)
    # As counts, none of them zero, which add up to the total.
    share = np.concatenate([likely, outside], axis=1)
    one = np.concatenate([inside, np.ones_like(outside, bool)], axis=1)
    cumulative = (share / share.sum(axis=1, keepdims=True)).cumsum(axis=1)
    room = TOTAL - one.sum(axis=1, keepdims=True)
    cumulative = np.floor(cumulative * room) + one.cumsum(axis=1)
    cumulative[:, -1] = TOTAL
    cumulative = np.concatenate([np.zeros_like(outside), cumulative], axis=1)
    (_, _, hidden, last), (_, _, hidden_bias, last_bias) = modules.weights, modules.biases
    decoder = [hidden, hidden_bias[:, 0], last, last_bias[:, 0]]
    low = torch.from_numpy(first - FARTHEST).int()
    return dict(
        zip(NAMES, [low, torch.from_numpy(cumulative).int(), *(w[module] for w in decoder)])
    )


@cache
def read_codecs(directory: Path) -> dict[str, Codec]:
    """What a cache's rows are read by.

    Raises:
        Failure: the file is damaged.
    """
    path = directory / FILE
    if file_hash(path) != read_json(directory / "config.json")["code"]["sha256"]:
        raise Failure(f"{path} is damaged, and with it all of the cache: write it anew")
    tensors = load_file(path)
    there = {name.partition("/")[0] for name in tensors}
    return {modality: Codec.of(tensors, modality) for modality in MODALITIES if modality in there}


class CodedRows:
    """A modality's rows of a shard, read as if they were the float16 array (V, samples, T).

    Args:
        words: of all rows, one after the other.
        counts: (V, samples) how many words a row has; none where the sample could not be used.
        codec: reads them.
    """

    def __init__(self, words: np.ndarray, counts: np.ndarray, codec: Codec):
        self.words, self.counts, self.codec = words, counts, codec
        self.ends = counts.cumsum(dtype=np.int64).reshape(counts.shape)
        self.shape = (*counts.shape, len(codec.decoder[-1]))

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, where: Any) -> np.ndarray:
        counts, ends = self.counts[where], self.ends[where]
        rows = np.full((counts.size, self.shape[-1]), np.nan, np.float16)
        stored = np.flatnonzero(counts)
        spans = zip(ends.ravel()[stored], counts.ravel()[stored])
        values = [self.codec.decode(self.words[end - count : end]) for end, count in spans]
        if values:
            rows[stored] = self.codec.embed(np.stack(values))
        return rows.reshape(*counts.shape, -1)


class Coder:
    """What writes a cache's rows: the bottleneck of a bank's highest rate.

    Args:
        place: of the bank: its folder, or its run.
        teacher: whose embeddings it codes.
        device: where its encoder runs.

    Raises:
        UsageError: there is no bank, or another teacher's.
    """

    def __init__(self, place: str, teacher: dict[str, Any], device: torch.device):
        try:
            self.bank = RDMBank.load(bank_folder(Path(place)), teacher).to(device)
        except (FileNotFoundError, ValueError) as error:
            raise UsageError(f"--code-with '{place}': {error}") from error
        self.module = self.bank.rates.index(max(self.bank.rates))
        self.device = device

    def begin(self, directory: Path) -> dict[str, Any]:
        """Write a cache's tables, if they are not there, and say what it is coded with."""
        path = directory / FILE
        if not path.is_file():
            made = {m: tables(getattr(self.bank, m), self.module) for m in self.bank.modalities}
            write_tensors(path, {f"{m}/{n}": t for m, own in made.items() for n, t in own.items()})
        rate, bank = self.bank.rates[self.module], weights_hash(self.bank)
        return {"rate": rate, "bank": bank, "sha256": file_hash(path)}

    @torch.no_grad()
    def values(self, modality: str, rows: Tensor) -> np.ndarray:
        """round(Y), (n, C), of embeddings (n, T)."""
        modules = getattr(self.bank, modality)
        slabs = [modules.encode(slab.to(self.device))[self.module] for slab in rows.split(SLAB)]
        return torch.cat(slabs).round().int().cpu().numpy()

    def decoded(self, directory: Path, modality: str, rows: Tensor) -> np.ndarray:
        """What a cache gives back of embeddings (n, T)."""
        return read_codecs(directory)[modality].embed(self.values(modality, rows))

    def pack(self, directory: Path, embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a shard's file holds in the place of its embeddings, (V or 1, samples, T) each."""
        packed = {}
        for modality, codec in read_codecs(directory).items():
            rows = embeddings[modality]
            stored = rows.isfinite().all(dim=-1)
            words = [codec.encode(row) for row in self.values(modality, rows[stored])]
            counts = torch.zeros(stored.shape, dtype=torch.int16)
            counts[stored] = torch.tensor([len(own) for own in words], dtype=torch.int16)
            joined = np.concatenate([np.empty(0, np.uint32), *words]).view(np.int32)
            packed |= {modality: torch.from_numpy(joined), f"{modality}/words": counts}
        return packed


def coded_rows(directory: Path, packed: dict[str, Tensor]) -> dict[str, CodedRows]:
    """The rows of what `Coder.pack` made."""
    return {
        m: CodedRows(packed[m].numpy().view(np.uint32), packed[f"{m}/words"].numpy(), codec)
        for m, codec in read_codecs(directory).items()
    }
