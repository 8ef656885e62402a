"""Runs a decoder in ONNX Runtime. The cache stays where it is: outputs of one call are bound as inputs of the next."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from fxfuse.decoder.names import place_of
from fxfuse.errors import FxfuseError
from fxfuse.package.manifest import Stage, read_manifest
from fxfuse.parity import require_onnxruntime
from fxfuse.runtime.positions import Array, Positions, RowLengths, check_chunk, checked, checked_ids, last

DTYPES = {"float32": np.float32, "float16": np.float16}

Activations = Literal["float32", "int8"]
ACCURACY: dict[Activations, str] = {"float32": "1", "int8": "4"}
"""ONNX Runtime's level of accuracy for products with weights of few bits, by what they are to be computed in."""


class Session:
    """Runs a folder that `fxfuse export` wrote for a decoder, or a graph alone with the names that it uses.

    A growing cache is what the last call gave, handed on without a copy. A static one is allocated once, [B, H, T, D],
    and bound as input and as output.

    Args:
        source: a folder with ``fxfuse.json``, or an ONNX file.
        max_length: T of a static cache; needed where neither the graph nor the model's context says it.
        threads: how many threads ONNX Runtime uses within an operator; 0: as many as there are cores.

    Raises:
        FxfuseError: `source` is no such folder or graph, onnxruntime is missing or does not load it, the cache is of
            bfloat16, for which its CPU provider has no kernels, or `max_length` does not fit the cache.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        max_length: int | None = None,
        threads: int = 0,
        activations: Activations = "float32",
    ) -> None:
        if activations not in ACCURACY:
            raise FxfuseError(f"unknown activations={activations!r}", where="activations", hint=" or ".join(ACCURACY))
        self._ort = require_onnxruntime()
        folder, self.manifest = read_manifest(source)
        cache = self.manifest.cache
        if cache.dtype not in DTYPES:
            raise FxfuseError(
                f"ONNX Runtime's CPU provider does not run {cache.dtype}",
                where=str(source),
                hint="export the model in float32 or float16",
            )
        self._dtype = DTYPES[cache.dtype]
        self.max_length = self._length(max_length)
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", ACCURACY[activations])
        self._sessions: dict[str, Any] = {}
        for name in self.manifest.files:
            try:
                self._sessions[name] = self._ort.InferenceSession(
                    str(folder / name), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # onnxruntime's exceptions have no common base
                raise FxfuseError(f"ONNX Runtime does not load it: {error}", where=str(folder / name)) from error
        self.reset()

    @property
    def reads_mask(self) -> bool:
        """Whether the graphs take an attention_mask; otherwise rows may be padded on the right alone."""
        return "attention_mask" in self.manifest.prefill.inputs

    @property
    def length(self) -> int:
        """P: how many columns of the cache are written."""
        return self._positions.length

    @property
    def pointers(self) -> Mapping[str, int]:
        """The address in memory of each input of the cache, by name: it shows that nothing is copied."""
        return {name: value.data_ptr() for name, value in self._cache.items()}

    def reset(self) -> None:
        """Forgets all that was read, and the cache."""
        self._positions = Positions() if self.reads_mask else RowLengths()
        self._cache: dict[str, Any] = {}
        self._bindings: dict[str, Any] = {}

    def prefill(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, chunk: int | None = None
    ) -> torch.Tensor:
        """Reads tokens, after those that were read before, and gives the logits [B, V] after each row's last one.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S], of these tokens: 0 where a row is padded, on the right or on the left. None:
                nowhere.
            chunk: read so many columns at a time, so that the logits [B, S, V] take less memory. A graph that is made
                for a number of tokens is given that many; where fewer are left, the decode graph reads them one by one.

        Raises:
            FxfuseError: the shapes do not fit, there are more tokens than a static cache has room for, or a row is
                padded where the cache does not take that.
        """
        tokens, seen = checked(input_ids, attention_mask)
        ids, mask = tokens.numpy(), seen.numpy()
        check_chunk(chunk)
        final, result = last(seen), None
        for stage, start, end in self._calls(ids.shape[1], chunk):
            logits = self._run(stage, ids[:, start:end], mask[:, start:end])
            here = (final >= start) & (final < end)
            result = torch.empty(len(ids), logits.shape[-1], dtype=logits.dtype) if result is None else result
            result[here] = logits[here, final[here] - start]
        assert result is not None
        return result

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Reads one token a row, int64 [B], and gives the logits [B, V] after it.

        Raises:
            FxfuseError: nothing was read before, there are more or fewer rows than then, or a static cache is full.
        """
        if self.length == 0:
            raise FxfuseError("there is nothing to go on from", where="step", hint="prefill(input_ids) first")
        ids = checked_ids(tokens[:, None]).numpy()
        return self._run(self.manifest.decode, ids, np.ones_like(ids))[:, -1]

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i of the cache becomes what row ``rows[i]`` was: how a beam search keeps the rows that it chose.

        Args:
            rows: int64 [B]; the new batch may be larger or smaller. As long as it is neither, a static cache stays in
                its buffers.

        Raises:
            FxfuseError: there are no such rows.
        """
        index = self._positions.reorder(rows)
        for name, value in self._cache.items():
            chosen = value.numpy()[index]
            if self.manifest.cache.form != "growing" and chosen.shape == value.numpy().shape:
                value.numpy()[...] = chosen
            else:
                self._cache[name] = self._ort.OrtValue.ortvalue_from_numpy(chosen)
                self._bindings.clear()

    def _calls(self, length: int, chunk: int | None) -> list[tuple[Stage, int, int]]:
        """Which graph reads which columns of a prompt: (stage, first column, column after the last)."""
        manifest, start, calls = self.manifest, 0, []
        cache, context = manifest.cache, manifest.model.context_length
        if chunk is None and cache.form == "streaming" and cache.max_length is not None and context is not None:
            # The keys of one call are rotated by C + S - 1 places, and a table of cos and sin has no more.
            chunk = max(context - cache.max_length + 1, 1)
        while (rest := length - start) > 0:
            widths = [
                (stage, stage.tokens or min(chunk or rest, rest)) for stage in (manifest.prefill, manifest.decode)
            ]
            fitting = [(stage, width) for stage, width in widths if width <= rest]
            if not fitting:
                raise FxfuseError(
                    f"of {length} tokens {rest} are left over: a call takes {manifest.prefill.tokens}",
                    where="input_ids",
                    hint="write a decode graph for one token beside it (--pair), or pass a multiple of that number",
                )
            stage, width = fitting[0]
            calls.append((stage, start, start + width))
            start += width
        return calls

    def _run(self, stage: Stage, ids: Array, mask: Array) -> torch.Tensor:
        """Runs one graph on `ids` and their `mask`, both int64 [B, S]: the logits [B, S, V]. The cache is updated."""
        if self.max_length is not None and self.length + ids.shape[1] > self.max_length:
            raise FxfuseError(
                f"{self.length} + {ids.shape[1]} tokens do not fit into a cache of {self.max_length}",
                where="max_length",
                hint="open the session with a larger max_length",
            )
        if self.manifest.cache.form == "streaming" and not bool(mask.all()):
            raise FxfuseError(
                "a streaming cache takes rows of one length, without padding",
                where="attention_mask",
                hint="pass prompts of one length, or run rows of other lengths by themselves",
            )
        attention_mask, position_ids = self._positions.append(mask)
        feed = {"input_ids": ids, "position_ids": position_ids}
        if attention_mask is not None:
            feed["attention_mask"] = attention_mask
        if not self._cache:
            self._cache = self._allocate(len(ids))
        session = self._sessions[stage.file]
        binding = self._binding(stage)
        # Kept until the run is over: ONNX Runtime reads them where they are.
        held = {name: np.ascontiguousarray(feed[name]) for name in stage.inputs if name in feed}
        for name, array in held.items():
            binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array))
        binding.bind_output("logits", "cpu")
        grown = [link for link in self.manifest.links if not link.shared]
        for link in grown:
            binding.bind_ortvalue_input(link.input, self._cache[link.input])
            binding.bind_output(link.output, "cpu")
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions have no common base
            self.reset()  # a cache that is half written is none
            raise FxfuseError(f"ONNX Runtime fails to run the model: {error}", where=stage.file) from error
        # In the order in which they were bound first.
        shared = [link.output for link in self.manifest.links if link.shared]
        names = [*shared, "logits", *(link.output for link in grown)]
        outputs = dict(zip(names, binding.get_outputs(), strict=True))
        for link in grown:
            self._cache[link.input] = outputs[link.output]
        return torch.from_numpy(outputs["logits"].numpy())

    def _binding(self, stage: Stage) -> Any:
        """The stage's binding of inputs and outputs. Buffers that past and present share are bound once, for all
        calls."""
        if stage.file not in self._bindings:
            binding = self._bindings[stage.file] = self._sessions[stage.file].io_binding()
            for link in self.manifest.links:
                if link.shared:
                    binding.bind_ortvalue_input(link.input, self._cache[link.input])
                    binding.bind_ortvalue_output(link.output, self._cache[link.input])
        return self._bindings[stage.file]

    def _allocate(self, batch: int) -> dict[str, Any]:
        """An empty cache: buffers of zeros, or tensors of length 0 where the cache grows."""
        cache = self.manifest.cache
        length = 0 if self.max_length is None else self.max_length
        buffers = {}
        for link in self.manifest.links:
            place = place_of(link.input)
            if place is None:
                raise FxfuseError(f"{link.input} is no name of a cache", where="links")
            layer = cache.layers[place.layer]
            zeros = np.zeros((batch, layer.heads, layer.slots or length, layer.size(place.what)), self._dtype)
            buffers[link.input] = self._ort.OrtValue.ortvalue_from_numpy(zeros)
        return buffers

    def _length(self, asked: int | None) -> int | None:
        """T of the buffers, by what the caller asked for, the graph and the model; None where they have no one
        length."""
        cache = self.manifest.cache
        if cache.form == "growing":
            if asked is not None:
                raise FxfuseError("the cache grows: it has no max_length", where="max_length", hint="leave it out")
            return None
        if all(layer.slots for layer in cache.layers):
            if asked is not None:
                raise FxfuseError(
                    "every layer's cache has a length that the graph fixes, and no text is too long for it",
                    where="max_length",
                    hint="leave it out",
                )
            return None
        if cache.max_length is not None and asked not in (None, cache.max_length):
            raise FxfuseError(
                f"the graph is made for a cache of {cache.max_length} tokens",
                where=f"max_length={asked}",
                hint="leave it out, or export the model again",
            )
        length = asked or cache.max_length or self.manifest.model.context_length
        if length is None or length < 1:
            raise FxfuseError(
                "how many tokens the cache is to hold is not known",
                where="max_length",
                hint="Session(…, max_length=512)",
            )
        return length
