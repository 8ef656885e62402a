"""Eighty ways to use flex_attention, written as their papers and libraries define them.

Sources by name: gym is https://github.com/meta-pytorch/attention-gym, transformers its `masking_utils.py`, TorchTune
its `modules/attention_utils.py`.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention, or_masks

HEADS, SIZE, LONGEST, BATCHES = 4, 8, 48, 4
INF = float("inf")


class Captured(nn.Module):
    """What the mods capture: tables by head, position, batch, document."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(7)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw)

        positions = torch.arange(LONGEST)
        tensors = {
            "slopes": 2.0 ** -(8.0 * (torch.arange(HEADS) + 1) / HEADS),
            "temperature": normal(HEADS).abs() + 0.5,
            "rates": normal(HEADS).abs() * 0.1,
            "windows": torch.tensor([2, 5, 9, 48]),
            "sinks": normal(HEADS),
            "buckets": normal(HEADS, 32) * 0.5,
            "clipped": normal(9, HEADS),
            "per_key": normal(LONGEST).abs() + 0.1,
            "per_query": normal(LONGEST).abs() + 0.1,
            "relative": normal(HEADS, LONGEST, LONGEST),
            "key_bias": normal(BATCHES, LONGEST),
            "gates": -normal(BATCHES, HEADS, LONGEST).abs().cumsum(-1) * 0.1,
            "document": (positions * 7 // 48),
            "offsets": torch.tensor([0, 7, 14, 21, 28, 35, 42]),
            "packed": torch.stack([(positions * n) // LONGEST for n in (2, 3, 5, 7)]),
            "lengths": torch.tensor([6, 11, 3, 19]),
            "prefix": torch.tensor([4, 1, 9, 0]),
            "left": torch.tensor([0, 2, 3, 1]),
            "bidirectional": torch.tensor([True, False, True, False]),
            "is_global": positions % 11 == 0,
            "padding": torch.stack([positions >= n for n in (0, 2, 5, 1)]),
            "images": torch.stack([torch.where((positions // n) % 2 == 1, positions // n, -1) for n in (2, 3, 4, 5)]),
            "media": (positions // 9) - 1,
            "tree": (positions[:, None] % (positions[None] + 1)) == positions[None] % 3,
            "dropped": torch.rand(HEADS, LONGEST, LONGEST, generator=draw) > 0.2,
            "blocks": torch.rand(LONGEST // 4, LONGEST // 4, generator=draw) > 0.6,
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.learned = nn.Parameter(normal(HEADS, LONGEST, LONGEST))


@dataclass(frozen=True)
class Mods:
    """One use: the functions, and what goes with them."""

    score: Callable[..., Any] | None = None
    mask: Callable[..., Any] | None = None
    scale: float | None = None
    kv_heads: int = HEADS
    v_size: int = SIZE
    lse: bool = False
    after: Callable[..., Any] | None = None
    """Of the output and its log-sum-exp."""
    before: Callable[..., Any] | None = None
    """Of k and v."""


class Idiom(Captured):
    """One use as a model: q [B, H, S, D], k and v [B, Hkv, S, D] to the output."""

    def __init__(self, define: Callable[[Captured], Mods]) -> None:
        super().__init__()
        self.define = define

    def forward(self, q, k, v):
        mods = self.define(self)
        if mods.before is not None:
            k, v = mods.before(k, v)
        mask = None
        if mods.mask is not None:
            mask = create_block_mask(mods.mask, q.shape[0], HEADS, q.shape[2], k.shape[2], device=q.device)
        result = flex_attention(
            q,
            k,
            v,
            score_mod=mods.score,
            block_mask=mask,
            scale=mods.scale,
            enable_gqa=mods.kv_heads != HEADS,
            return_lse=mods.lse or mods.after is not None,
        )
        return mods.after(*result) if mods.after is not None else result


@dataclass(frozen=True)
class Entry:
    name: str
    source: str
    define: Callable[[Captured], Mods]
    whole: bool = True
    """Expected to become one Attention."""

    def model(self) -> Idiom:
        return Idiom(self.define).eval()

    @property
    def mods(self) -> Mods:
        return self.define(Captured())

    @property
    def text(self) -> str:
        """The mod as it is written here."""
        lines = textwrap.dedent(inspect.getsource(self.define)).splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("def ")) + 1
        return textwrap.dedent("\n".join(lines[start:])).strip()


IDIOMS: list[Entry] = []


def idiom(name: str, source: str, whole: bool = True) -> Callable[[Any], Any]:
    def add(define: Callable[[Captured], Mods]) -> Callable[[Captured], Mods]:
        IDIOMS.append(Entry(name, source, define, whole))
        return define

    return add


def causal_mask(b, h, q, kv):
    return q >= kv


# --- masks -----------------------------------------------------------------------------------------------------------


@idiom("no mod", "PyTorch")
def plain(m):
    return Mods()


@idiom("causal", "gym")
def causal(m):
    return Mods(mask=lambda b, h, q, kv: q >= kv)


@idiom("causal, the other way round", "transformers causal_mask_function")
def causal_transformers(m):
    return Mods(mask=lambda b, h, q, kv: kv <= q)


@idiom("strictly causal", "https://arxiv.org/abs/2001.04451")
def strictly_causal(m):
    return Mods(mask=lambda b, h, q, kv: q > kv)


@idiom("sliding window", "gym sliding_window, https://arxiv.org/abs/2310.06825")
def sliding_window(m):
    return Mods(mask=lambda b, h, q, kv: (q >= kv) & (q - kv <= 5))


@idiom("sliding window by and_masks", "transformers sliding_window_causal_mask_function")
def sliding_window_and(m):
    return Mods(mask=and_masks(lambda b, h, q, kv: kv > q - 5, causal_mask))


@idiom("local window, both sides", "https://arxiv.org/abs/2004.05150")
def local_window(m):
    return Mods(mask=lambda b, h, q, kv: (q - kv).abs() <= 3)


@idiom("prefix LM", "gym prefix_lm, https://arxiv.org/abs/1910.10683")
def prefix_lm(m):
    return Mods(mask=or_masks(lambda b, h, q, kv: kv < 6, causal_mask))


@idiom("prefix LM, a prefix for each sequence", "gym")
def prefix_lm_batched(m):
    return Mods(mask=or_masks(lambda b, h, q, kv: kv < m.prefix[b], causal_mask))


@idiom("documents", "gym document_mask")
def documents(m):
    return Mods(mask=lambda b, h, q, kv: m.document[q] == m.document[kv])


@idiom("documents, causal inside by their offsets", "gym generate_doc_mask_mod")
def documents_causal(m):
    def mask(b, h, q, kv):
        same = m.document[q] == m.document[kv]
        return same & causal_mask(b, h, q - m.offsets[m.document[q]], kv - m.offsets[m.document[kv]])

    return Mods(mask=mask)


@idiom("packed, block causal", "TorchTune packed_block_causal_mask")
def packed_block_causal(m):
    return Mods(mask=lambda b, h, q, kv: (q >= kv) & (m.packed[b, q] == m.packed[b, kv]))


@idiom("packed, by and_masks", "transformers packed_sequence_mask_function")
def packed_and(m):
    return Mods(mask=and_masks(causal_mask, lambda b, h, q, kv: m.packed[b, q] == m.packed[b, kv]))


@idiom("prefix LM in each document", "gym")
def documents_prefix(m):
    def mask(b, h, q, kv):
        inside = kv - m.offsets[m.document[kv]] < 3
        return (m.document[q] == m.document[kv]) & (inside | (q >= kv))

    return Mods(mask=mask)


@idiom("padded keys, by length", "gym batchify")
def padded_keys(m):
    return Mods(mask=lambda b, h, q, kv: kv < m.lengths[b])


@idiom("padded queries and keys", "gym")
def padded_both(m):
    return Mods(mask=lambda b, h, q, kv: (q < m.lengths[b]) & (kv < m.lengths[b]))


@idiom("padding mask, causal", "transformers padding_mask_function")
def padding_causal(m):
    return Mods(mask=and_masks(causal_mask, lambda b, h, q, kv: m.padding[b, kv]))


@idiom("neighbourhood in two dims", "gym natten, https://arxiv.org/abs/2204.07143")
def natten(m):
    width, height, kernel = 8, 6, 3

    def mask(b, h, q, kv):
        q_x, q_y, kv_x, kv_y = q // width, q % width, kv // width, kv % width
        x = q_x.clamp(kernel // 2, (height - 1) - kernel // 2)
        y = q_y.clamp(kernel // 2, (width - 1) - kernel // 2)
        return ((x - kv_x).abs() <= kernel // 2) & ((y - kv_y).abs() <= kernel // 2)

    return Mods(mask=mask)


@idiom("neighbourhood in tiles", "gym tiled natten")
def natten_tiled(m):
    width, tile, tiles = 8, 2, 4

    def place(i):
        tile_id, inside = i // (tile * tile), i % (tile * tile)
        return (tile_id // tiles) * tile + inside // tile, (tile_id % tiles) * tile + inside % tile

    def mask(b, h, q, kv):
        (q_x, q_y), (kv_x, kv_y) = place(q), place(kv)
        y = q_y.clamp(1, width - 2)
        return ((q_x - kv_x).abs() <= 1) & ((y - kv_y).abs() <= 1)

    return Mods(mask=mask)


@idiom("dilated sliding window", "gym dilated_sliding_window, https://arxiv.org/abs/2004.05150")
def dilated(m):
    return Mods(mask=lambda b, h, q, kv: ((q - kv).abs() <= 6) & ((q - kv).abs() % 2 == 0))


@idiom("strided sparse", "https://arxiv.org/abs/1904.10509")
def strided(m):
    return Mods(mask=lambda b, h, q, kv: (q >= kv) & ((q - kv < 4) | ((q - kv) % 4 == 0)))


@idiom("fixed sparse", "https://arxiv.org/abs/1904.10509")
def fixed_sparse(m):
    return Mods(mask=lambda b, h, q, kv: (q >= kv) & ((q // 4 == kv // 4) | (kv % 4 >= 3)))


@idiom("BigBird: window, global, random blocks", "https://arxiv.org/abs/2007.14062")
def bigbird(m):
    def mask(b, h, q, kv):
        ends = (q // 4 == 0) | (kv // 4 == 0)
        return ends | ((q // 4 - kv // 4).abs() <= 1) | m.blocks[q // 4, kv // 4]

    return Mods(mask=mask)


@idiom("Longformer: window and global tokens", "https://arxiv.org/abs/2004.05150")
def longformer(m):
    return Mods(mask=lambda b, h, q, kv: ((q - kv).abs() <= 2) | m.is_global[q] | m.is_global[kv])


@idiom("first tokens and a window", "https://arxiv.org/abs/2309.17453")
def streaming(m):
    return Mods(mask=lambda b, h, q, kv: (q >= kv) & ((kv < 4) | (q - kv < 6)))


@idiom("chunks", "transformers chunked_overlay (Llama 4)")
def chunks(m):
    return Mods(mask=and_masks(lambda b, h, q, kv: kv // 8 == q // 8, causal_mask))


@idiom("chunks after left padding", "transformers chunked_overlay")
def chunks_padded(m):
    return Mods(mask=and_masks(lambda b, h, q, kv: (kv - m.left[b]) // 8 == (q - m.left[b]) // 8, causal_mask))


@idiom("block diffusion", "https://arxiv.org/abs/2503.09573")
def block_diffusion(m):
    half, size = 24, 4

    def mask(b, h, q, kv):
        clean_q, clean_kv = q >= half, kv >= half
        block_q = torch.where(clean_q, (q - half) // size, q // size)
        block_kv = torch.where(clean_kv, (kv - half) // size, kv // size)
        diagonal = (block_q == block_kv) & (clean_q == clean_kv)
        offset = (block_q > block_kv) & clean_kv & ~clean_q
        return diagonal | offset | ((block_q >= block_kv) & clean_kv & clean_q)

    return Mods(mask=mask)


@idiom("transfusion: images see themselves", "gym transfusion, https://arxiv.org/abs/2408.11039")
def transfusion(m):
    offsets, sizes = (5, 20), (4, 6)

    def mask(b, h, q, kv):
        seen = q >= kv
        for start, size in zip(offsets, sizes, strict=True):
            seen = seen | ((q >= start) & (q < start + size) & (kv >= start) & (kv < start + size))
        return seen

    return Mods(mask=mask)


@idiom("image tokens see their image", "transformers token_type_ids_mask_function (Gemma 3)")
def image_groups(m):
    return Mods(
        mask=or_masks(
            causal_mask,
            lambda b, h, q, kv: (m.images[b, q] == m.images[b, kv]) & (m.images[b, q] >= 0),
        )
    )


@idiom("text sees the image before it", "gym flamingo, https://arxiv.org/abs/2204.14198")
def flamingo(m):
    return Mods(mask=lambda b, h, q, kv: m.media[q] == kv // 9)


@idiom("a tree of continuations", "https://arxiv.org/abs/2305.09781")
def tree(m):
    return Mods(mask=lambda b, h, q, kv: m.tree[q, kv] | (q == kv))


@idiom("the future only", "PyTorch")
def anti_causal(m):
    return Mods(mask=lambda b, h, q, kv: q <= kv)


@idiom("not itself", "https://arxiv.org/abs/2001.04451")
def not_itself(m):
    return Mods(mask=lambda b, h, q, kv: q != kv)


@idiom("frames, causal in time", "gym")
def frames(m):
    return Mods(mask=lambda b, h, q, kv: q // 6 >= kv // 6)


@idiom("a window for each head", "gym")
def windows_by_head(m):
    return Mods(mask=lambda b, h, q, kv: (q >= kv) & (q - kv < m.windows[h]))


@idiom("half of the heads causal", "gym")
def heads_causal(m):
    return Mods(mask=lambda b, h, q, kv: (h >= HEADS // 2) | (q >= kv))


@idiom("causal for some sequences", "transformers")
def sequences_causal(m):
    return Mods(mask=lambda b, h, q, kv: m.bidirectional[b] | (q >= kv))


@idiom("keys dropped for each head", "gym")
def dropped_keys(m):
    return Mods(mask=lambda b, h, q, kv: m.dropped[h, q, kv])


@idiom("causal, the first keys only", "PyTorch")
def first_keys(m):
    return Mods(mask=and_masks(causal_mask, lambda b, h, q, kv: kv < 10))


# --- scores ----------------------------------------------------------------------------------------------------------


@idiom("causal in the score", "PyTorch")
def causal_score(m):
    return Mods(score=lambda s, b, h, q, kv: torch.where(q >= kv, s, -INF))


@idiom("documents in the score", "PyTorch")
def documents_score(m):
    return Mods(score=lambda s, b, h, q, kv: s.masked_fill(m.document[q] != m.document[kv], -INF))


@idiom("ALiBi", "gym alibi, https://arxiv.org/abs/2108.12409")
def alibi(m):
    return Mods(score=lambda s, b, h, q, kv: s + (kv - q) * torch.exp2(-((h + 1) * 8.0 / HEADS)))


@idiom("ALiBi, captured slopes, causal", "https://arxiv.org/abs/2108.12409")
def alibi_causal(m):
    return Mods(score=lambda s, b, h, q, kv: s + m.slopes[h] * (kv - q), mask=causal_mask)


@idiom("ALiBi, both sides", "https://arxiv.org/abs/2108.12409")
def alibi_symmetric(m):
    return Mods(score=lambda s, b, h, q, kv: s - m.slopes[h] * (q - kv).abs())


@idiom("relative position", "PyTorch")
def relative_position(m):
    return Mods(score=lambda s, b, h, q, kv: s + (q - kv))


@idiom("T5 buckets", "https://arxiv.org/abs/1910.10683")
def t5(m):
    def score(s, b, h, q, kv):
        away = kv - q
        bucket = torch.where(away > 0, 16, 0)
        away = away.abs()
        far = 8 + (torch.log(away.to(torch.float32).clamp(min=1) / 8) / math.log(128 / 8) * 8).to(torch.int64)
        return s + m.buckets[h, bucket + torch.where(away < 8, away, far.clamp(max=15))]

    return Mods(score=score)


@idiom("relative table, clipped", "https://arxiv.org/abs/1803.02155")
def clipped_table(m):
    return Mods(score=lambda s, b, h, q, kv: s + m.clipped[(q - kv).clamp(-4, 4) + 4, h])


@idiom("relative table, learned", "https://arxiv.org/abs/2103.14030")
def learned_table(m):
    return Mods(score=lambda s, b, h, q, kv: s + m.learned[h, q, kv])


@idiom("relative table, causal", "https://arxiv.org/abs/2103.14030")
def table_causal(m):
    return Mods(score=lambda s, b, h, q, kv: s + m.relative[h, q, kv], mask=causal_mask)


@idiom("KERPLE: logarithmic", "https://arxiv.org/abs/2205.09921")
def kerple(m):
    return Mods(
        score=lambda s, b, h, q, kv: s - m.temperature[h] * torch.log(1 + m.slopes[h] * (q - kv).abs()),
        mask=causal_mask,
    )


@idiom("forgetting gates", "https://arxiv.org/abs/2503.02130")
def forgetting(m):
    return Mods(score=lambda s, b, h, q, kv: s + m.gates[b, h, q] - m.gates[b, h, kv], mask=causal_mask)


@idiom("bias of a padding mask", "PyTorch")
def key_bias(m):
    return Mods(score=lambda s, b, h, q, kv: s + m.key_bias[b, kv])


@idiom("cosine of the distance", "https://arxiv.org/abs/2212.10356")
def cosine(m):
    return Mods(score=lambda s, b, h, q, kv: s + torch.cos((q - kv) / 7.0) * m.rates[h])


@idiom("bias for each head", "PyTorch")
def head_bias(m):
    return Mods(score=lambda s, b, h, q, kv: s + m.sinks[h])


@idiom("bias of the row", "PyTorch")
def row_bias(m):
    return Mods(score=lambda s, b, h, q, kv: s + 2 * q + h)


@idiom("soft-cap", "gym tanh_softcap, https://arxiv.org/abs/2408.00118")
def softcap(m):
    return Mods(score=lambda s, b, h, q, kv: 30 * torch.tanh(s / 30))


@idiom("soft-cap, approximate", "gym tanh_softcap(approx=True)")
def softcap_approximate(m):
    return Mods(score=lambda s, b, h, q, kv: 30 * approximate_tanh(s / 30))


@idiom("soft-cap, then window", "https://arxiv.org/abs/2408.00118")
def softcap_window(m):
    return Mods(
        score=lambda s, b, h, q, kv: torch.tanh(s / 2.0) * 2.0, mask=lambda b, h, q, kv: (q >= kv) & (q - kv < 6)
    )


@idiom("soft-cap, then mask in the score", "gym")
def softcap_mask(m):
    return Mods(score=lambda s, b, h, q, kv: torch.where(q >= kv, torch.tanh(s / 2.0) * 2.0, -INF))


@idiom("soft-cap, rescaled", "gym")
def softcap_rescaled(m):
    return Mods(score=lambda s, b, h, q, kv: 0.5 * (4.0 * torch.tanh(s / 2.0)))


@idiom("soft-cap, then ALiBi", "gym")
def softcap_alibi(m):
    return Mods(score=lambda s, b, h, q, kv: 2.0 * torch.tanh(s / 2.0) + m.slopes[h] * (kv - q), mask=causal_mask)


@idiom("scale for each head", "https://arxiv.org/abs/2110.09456")
def head_scale(m):
    return Mods(score=lambda s, b, h, q, kv: s * m.temperature[h])


@idiom("temperature for each head, causal", "https://arxiv.org/abs/2010.04245")
def head_temperature(m):
    return Mods(score=lambda s, b, h, q, kv: s / m.temperature[h], mask=causal_mask)


@idiom("scale by the logarithm of the position", "https://arxiv.org/abs/2202.12172")
def log_scale(m):
    return Mods(score=lambda s, b, h, q, kv: s * torch.log(q + 2.0) / math.log(16), mask=causal_mask)


@idiom("temperature by position", "transformers (Llama 4)")
def position_temperature(m):
    return Mods(
        score=lambda s, b, h, q, kv: s * (torch.log(torch.floor((q + 1.0) / 8) + 1) * 0.1 + 1), mask=causal_mask
    )


@idiom("scale for each key", "PyTorch")
def key_scale(m):
    return Mods(score=lambda s, b, h, q, kv: s * m.per_key[kv])


@idiom("scale for query and key", "PyTorch")
def both_scales(m):
    return Mods(score=lambda s, b, h, q, kv: s * (m.per_query[q] * m.per_key[kv]) + m.key_bias[b, kv])


@idiom("a scale from a table by number", "PyTorch")
def by_number(m):
    return Mods(score=lambda s, b, h, q, kv: s * m.temperature[0] + m.slopes[1] * (kv - q))


@idiom("negative", "PyTorch")
def negative(m):
    return Mods(score=lambda s, b, h, q, kv: -s, mask=causal_mask)


@idiom("a scale of its own, twice", "PyTorch")
def own_scale(m):
    return Mods(score=lambda s, b, h, q, kv: s + 0.5 * s, scale=0.7)


@idiom("sinks by a column of zeros", "https://arxiv.org/abs/2309.17453")
def sinks_column(m):
    def one_more(k, v):
        return (torch.nn.functional.pad(t, (0, 0, 1, 0)) for t in (k, v))

    def score(s, b, h, q, kv):
        return torch.where(kv == 0, m.sinks[h], s)

    return Mods(score=score, mask=lambda b, h, q, kv: (kv == 0) | (q >= kv - 1), before=one_more)


@idiom("sinks by log-sum-exp", "transformers flex_attention_forward (GPT-OSS)")
def sinks_lse(m):
    return Mods(
        mask=causal_mask,
        after=lambda y, lse: y * torch.sigmoid(lse - m.sinks.view(1, -1, 1)).unsqueeze(-1),
    )


@idiom("log-sum-exp", "PyTorch return_lse")
def log_sum_exp(m):
    return Mods(mask=lambda b, h, q, kv: q > kv, lse=True)


@idiom("grouped heads, causal, wider values", "https://arxiv.org/abs/2305.13245")
def grouped(m):
    return Mods(score=lambda s, b, h, q, kv: s * m.temperature[h], mask=causal_mask, kv_heads=2, v_size=12)


# --- what no Attention computes --------------------------------------------------------------------------------------


@idiom("squared", "PyTorch", whole=False)
def squared(m):
    return Mods(score=lambda s, b, h, q, kv: s * s)


@idiom("sigmoid", "https://arxiv.org/abs/2409.04431", whole=False)
def sigmoid(m):
    return Mods(score=lambda s, b, h, q, kv: torch.sigmoid(s), mask=causal_mask)


@idiom("clamped", "PyTorch", whole=False)
def clamped(m):
    return Mods(score=lambda s, b, h, q, kv: s.clamp(-1, 1))


@idiom("ALiBi, then soft-cap", "gym", whole=False)
def alibi_softcap(m):
    return Mods(score=lambda s, b, h, q, kv: torch.tanh((s + m.slopes[h] * (kv - q)) / 5) * 5)


@idiom("scaled by distance", "https://arxiv.org/abs/2305.19370", whole=False)
def by_distance(m):
    return Mods(score=lambda s, b, h, q, kv: s / (1 + (q - kv).abs()))


@torch.library.custom_op("approx::tanh", mutates_args=())
def _tanh(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x)


@_tanh.register_fake
def _(x):
    return torch.tanh(x)


class _ApproximateTanh(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return torch.ops.approx.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        (result,) = ctx.saved_tensors
        return grad * (1 - result * result)

    @staticmethod
    def vmap(info, in_dims, x):
        return torch.tanh(x), 0


approximate_tanh = _ApproximateTanh.apply
