"""Greedy text from any session: a batch of token ids at once, or one text piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from fxfuse.errors import FxfuseError


class Decoder(Protocol):
    """What `Session` and `EagerSession` have in common."""

    @property
    def reads_mask(self) -> bool: ...

    @property
    def length(self) -> int: ...

    def reset(self) -> None: ...

    def prefill(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, chunk: int | None = None
    ) -> torch.Tensor: ...

    def step(self, tokens: torch.Tensor) -> torch.Tensor: ...

    def reorder(self, rows: torch.Tensor) -> None: ...


def generate(
    session: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos: Sequence[int] = (),
    chunk: int | None = None,
) -> list[list[int]]:
    """The tokens that follow each of the prompts, of any lengths, greedily; an end-of-text token ends a row.

    Args:
        prompts: token ids; shorter ones are padded on the left, so that a sliding window has no holes; on the right
            where the graph has no attention_mask, and each row goes on from its own end.
        chunk: read the prompts so many columns at a time.

    Raises:
        FxfuseError: no prompts, an empty one, or what the session refuses.
    """
    result: list[list[int]] = [[] for _ in prompts]
    done = [False for _ in prompts]
    for tokens in greedy(session, prompts, max_new_tokens=max_new_tokens, chunk=chunk):
        for row, token in enumerate(tokens):
            if not done[row]:
                result[row].append(token)
                done[row] = token in eos
        if all(done):
            break
    return result


def greedy(
    session: Decoder, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, chunk: int | None = None
) -> Iterator[list[int]]:
    """One token a row at a time, as they come."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise FxfuseError("a prompt holds at least one token", where="prompts")
    width = max(len(prompt) for prompt in prompts)
    pads = [[0] * (width - len(prompt)) for prompt in prompts]
    texts = [(list(prompt), [1] * len(prompt)) for prompt in prompts]
    right = not session.reads_mask
    ids = torch.tensor([text + pad if right else pad + text for pad, (text, _) in zip(pads, texts, strict=True)])
    mask = torch.tensor([ones + pad if right else pad + ones for pad, (_, ones) in zip(pads, texts, strict=True)])
    session.reset()
    logits = session.prefill(ids, mask, chunk=chunk)
    for count in range(max_new_tokens):
        tokens = logits.argmax(-1)
        yield tokens.tolist()
        if count + 1 < max_new_tokens:
            logits = session.step(tokens)


def stream(
    session: Decoder, tokenizer: Any, text: str, *, max_new_tokens: int, eos: Sequence[int] = ()
) -> Iterator[str]:
    """What follows `text`, piece by piece as it comes; a character is not shown before its last byte is there.

    Args:
        tokenizer: with `encode` and `decode`: of transformers, or of tokenizers.
    """
    encoded = tokenizer.encode(text)
    prompt = list(getattr(encoded, "ids", encoded))
    shown = _Shown(tokenizer.decode)
    for (token,) in greedy(session, [prompt], max_new_tokens=max_new_tokens):
        if token in eos:
            break
        if piece := shown.add(token):
            yield piece
    if piece := shown.rest():
        yield piece


class _Shown:
    """Decodes no more than the last few tokens for each piece, however long the text becomes."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self.tokens: list[int] = []
        self.text = ""

    def add(self, token: int) -> str:
        self.tokens.append(token)
        text = self.decode(self.tokens)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        piece = text[len(self.text) :]
        # The last token stays for context: some tokenizers put a space between two tokens and none before the first.
        self.tokens = self.tokens[-1:]
        self.text = self.decode(self.tokens)
        return piece

    def rest(self) -> str:
        return self.decode(self.tokens)[len(self.text) :]
