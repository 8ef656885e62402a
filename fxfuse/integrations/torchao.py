"""Quantises a model's weights by torchao before it is exported: ``quantize(model, "int4:block=32:symmetric")``.

The weights are rounded by `torchao.quantization.quantize_`, so that the eager model with them is what an export has to
agree with. A scheme is ``int2`` to ``int8``, with options behind colons:

    block=N      every N values along a row share a scale; block=row: the whole row (default 32, of int8 the row)
    symmetric    no zero points

Needs torchao (``pip install 'fxfuse[quantize]'``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxfuse.errors import FxfuseError
from fxfuse.installed import check_installed

NONE = "none"
_HINT = "int2 to int8, with :block=N or :block=row and :symmetric, as in int4:block=32:symmetric"
_BLOCK = 32


@dataclass(frozen=True)
class Scheme:
    """How a weight [N, K] is stored."""

    bits: int
    block: int | None
    """How many values along K share a scale; None: all of a row."""
    symmetric: bool

    def __str__(self) -> str:
        block = "row" if self.block is None else self.block
        return f"int{self.bits}:block={block}" + (":symmetric" if self.symmetric else "")


def parse_scheme(text: str) -> Scheme | None:
    """The scheme of that name; None for ``"none"``.

    Raises:
        FxfuseError: there is no such scheme.
    """
    if text == NONE:
        return None
    kind, *options = text.split(":")
    if kind not in [f"int{bits}" for bits in range(2, 9)]:
        raise FxfuseError(f"there is no scheme {kind!r}", where=text, hint=_HINT)
    bits = int(kind.removeprefix("int"))
    block, symmetric = (None if bits == 8 else _BLOCK), False
    for option in options:
        name, _, value = option.partition("=")
        if option == "symmetric":
            symmetric = True
        elif option == "block=row":
            block = None
        elif name == "block" and value.isdecimal() and int(value) > 1:
            block = int(value)
        else:
            raise FxfuseError(f"{option!r} is no option of a scheme", where=text, hint=_HINT)
    return Scheme(bits, block, symmetric)


def quantize(
    model: nn.Module, scheme: str, *, embedding: str | None = None, head: str | None = None
) -> Mapping[str, Scheme | None]:
    """Quantises the weights of linear layers and embeddings in place.

    A weight that several modules share, as an output tied to its embedding, stays one.

    Args:
        model: its weights in float32, float16 or bfloat16.
        scheme: of linear layers.
        embedding: of embeddings; None: they are left as they are, unless the output is tied to them.
        head: of the layer that gives the logits; None: `scheme`, or where it is tied to an embedding, `embedding`.

    Returns:
        What became of each weight, by its name; None: it was left as it is.

    Raises:
        FxfuseError: no such scheme, a block that rows are no multiple of, weights that are quantised already or tied
            under two schemes, nothing to quantise; torchao is not installed, or not in a release that fits.
    """
    linear = parse_scheme(scheme)
    chosen: dict[str, Scheme | None] = {}
    first: dict[int, nn.Module] = {}
    shared: dict[int, list[nn.Module]] = {}
    schemes: dict[int, Scheme | None] = {}
    output = _output(model)
    tied = id(getattr(output, "weight", None))
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        weight = module.weight
        shared.setdefault(id(weight), []).append(module)
        if id(weight) in first:
            continue
        first[id(weight)] = module
        by_name = f"{name}.weight" if name else "weight"
        if id(weight) == tied:
            wanted = _of_output(linear, embedding, head, _is_embedding(model, weight), by_name)
        elif isinstance(module, nn.Embedding):
            wanted = parse_scheme(embedding or NONE)
        else:
            wanted = linear
        if wanted is not None:
            _check(weight, wanted, by_name)
        chosen[by_name] = schemes[id(weight)] = wanted
    if not any(schemes.values()):
        raise FxfuseError(
            f"{type(model).__name__} has no weight to quantise",
            where=scheme,
            hint="linear layers and embeddings are quantised (nn.Linear, nn.Embedding)",
        )
    for wanted in dict.fromkeys(schemes.values()):
        if wanted is not None:
            _apply(model, wanted, [first[key] for key, each in schemes.items() if each == wanted])
    for key, modules in shared.items():
        for module in modules[1:]:
            module.weight = first[key].weight
    return chosen


def described(chosen: Mapping[str, Scheme | None]) -> str:
    """One line: how many weights have which scheme, and which are as they were."""
    counts: dict[str, int] = {}
    for scheme in chosen.values():
        if scheme is not None:
            counts[str(scheme)] = counts.get(str(scheme), 0) + 1
    left = [name for name, scheme in chosen.items() if scheme is None]
    done = ", ".join(f"{count} weights are {scheme}" for scheme, count in counts.items())
    return done + (f"; as they were: {', '.join(left)}" if left else "")


def _of_output(linear: Scheme | None, embedding: str | None, head: str | None, tied: bool, name: str) -> Scheme | None:
    if not tied:
        return linear if head is None else parse_scheme(head)
    asked = [parse_scheme(text) for text in (embedding, head) if text is not None]
    if len(set(asked)) > 1:
        raise FxfuseError(
            f"the output and the embedding are one weight, and cannot be {head} and {embedding}",
            where=name,
            hint="name one scheme for both",
        )
    return asked[0] if asked else linear


def _output(model: Any) -> Any:
    """The layer that gives the logits, of transformers' models and torchtune's; what a tied one reads."""
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else getattr(model, "output", None)
    return getattr(found, "tied_module", found)


def _is_embedding(model: nn.Module, weight: torch.Tensor) -> bool:
    return any(m.weight is weight for m in model.modules() if isinstance(m, nn.Embedding))


def _check(weight: torch.Tensor, scheme: Scheme, name: str) -> None:
    if type(weight.data) is not torch.Tensor or not weight.is_floating_point():
        raise FxfuseError(
            f"it is quantised already ({type(weight.data).__name__})", where=name, hint="leave it as it is"
        )
    if scheme.block is not None and weight.shape[1] % scheme.block:
        raise FxfuseError(
            f"its rows have {weight.shape[1]} values, which are no whole number of blocks of {scheme.block}",
            where=f"{name}, {scheme}",
            hint="another block=N, or block=row",
        )


def _apply(model: nn.Module, scheme: Scheme, modules: list[nn.Module]) -> None:
    check_installed("quantize")
    try:
        from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup, quantize_
    except ImportError as error:
        raise FxfuseError(
            f"torchao cannot be imported: {error}", where=str(scheme), hint="pip install 'fxfuse[quantize]'"
        ) from error
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{scheme.bits}"),
        granularity=PerAxis(0) if scheme.block is None else PerGroup(scheme.block),
        mapping_type=MappingType.SYMMETRIC if scheme.symmetric else MappingType.ASYMMETRIC,
    )
    waiting = {id(module) for module in modules}

    def is_next(module: nn.Module, _: str) -> bool:
        """Once each: a module may be there under several names."""
        found = id(module) in waiting
        waiting.discard(id(module))
        return found

    with torch.no_grad():
        quantize_(model, config, filter_fn=is_next)
