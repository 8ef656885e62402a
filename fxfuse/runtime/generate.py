"""Writes text greedily with any session: token ids for a batch of prompts (`generate`), or one text piece by piece
(`stream`)."""

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
    """The tokens that follow each of the prompts, each the likeliest after those before it.

    Args:
        session: is reset first.
        prompts: token ids, of any lengths. Shorter ones are padded on the left, so that a sliding window has no holes;
            on the right where the session's graph has no attention_mask, and each row goes on from its own end.
        max_new_tokens: how many tokens a row gets at most.
        eos: tokens that end a row; such a token is its last.
        chunk: read the prompts so many columns at a time, which takes less memory.

    Returns:
        The new tokens of each row.

    Raises:
        FxfuseError: there are no prompts, one is empty, or the session refuses them.
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
    """The same as they come: one token for each row, `max_new_tokens` times. Rows that have ended go on."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise FxfuseError("there is no prompt, or an empty one: each holds at least one token", where="prompts")
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
    """What follows `text`, piece by piece as it comes; a character of several tokens comes when its last one is there.

    Args:
        session: is reset first.
        tokenizer: one of transformers or of tokenizers, which has `encode` and `decode`.
        max_new_tokens: how many tokens are written at most.
        eos: tokens that end the text; they are not shown.

    Raises:
        FxfuseError: `text` has no tokens, or the session refuses them.
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
    """Turns tokens into pieces of text, one by one. However long the text becomes, only its last few tokens are
    decoded."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self.tokens: list[int] = []
        self.text = ""

    def add(self, token: int) -> str:
        """The text that this token adds; nothing yet if it ends within a character."""
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
        """The text of the tokens that were held back."""
        return self.decode(self.tokens)[len(self.text) :]
