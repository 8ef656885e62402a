"""Models of torchtune by the names of their builders."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fxfuse.errors import FxfuseError
from fxfuse.installed import check_installed

BATCH, SEQ = 2, 16
"""Batch and length of the sample inputs if none are given."""

Builder = Callable[..., torch.nn.Module]


def build(
    name: str, options: Mapping[str, Any], dtype: torch.dtype, *, blank: bool = False
) -> tuple[torch.nn.Module, str]:
    """The model that torchtune's builder `name` makes, in evaluation mode, and its family (``"llama3_2"``).

    Args:
        name: the builder of a model (``llama3_2_1b``) or of its components (``llama3_2``), perhaps with its family
        first (``qwen2.qwen2``). options: arguments of the builder. dtype: of weights and caches. It is PyTorch's
        default dtype during the build, for torchtune's rotary caches depend on that. blank: leave the weights
        uninitialised, for a checkpoint to fill.

    Raises:
        FxfuseError: unknown builder or option, missing option, or the builder refuses the values.
    """
    builder, family = find(name)
    _check_options(name, builder, options)
    with _default_dtype(dtype), torch.random.fork_rng(devices=[]), _NoInit() if blank else contextlib.nullcontext():
        torch.manual_seed(0)
        try:
            model = builder(**options)
        except Exception as error:
            raise FxfuseError(
                f"the builder refuses these options: {type(error).__name__}: {error}", where=f"torchtune:{name}"
            ) from error
    if not blank:
        _fill_empty(model)
    return model.eval().requires_grad_(False), family


def find(name: str) -> tuple[Builder, str]:
    """The builder of that name and the family it belongs to."""
    wanted, _, only = reversed(name.rpartition("."))
    found: dict[str, tuple[Builder, str]] = {}
    absent: dict[str, ImportError] = {}
    for family in _families():
        if only and family != only:
            continue
        try:
            module = importlib.import_module(f"torchtune.models.{family}")
        except ImportError as error:  # the multimodal families need torchvision
            absent[family] = error
            continue
        for candidate, function in _builders(module):
            found.setdefault(candidate, (function, family))
    if wanted in found:
        return found[wanted]
    for family, reason in absent.items():
        if wanted.startswith(family):
            raise FxfuseError(
                f"torchtune.models.{family} cannot be imported: {reason}",
                where=f"torchtune:{name}",
                hint="install what it names (torchvision must match torch), or write a factory function",
            ) from reason
    close = difflib.get_close_matches(wanted, found, n=4, cutoff=0.5)
    raise FxfuseError(
        "torchtune has no builder of that name",
        where=f"torchtune:{name}",
        hint="did you mean " + " or ".join(close) + "?" if close else "see torchtune.models",
    )


def sample(
    model: torch.nn.Module, batch: int | None, seq: int | None
) -> tuple[tuple[torch.Tensor, ...], dict[str, dict[int, str]]]:
    """Token inputs for `model` and which of their dimensions vary: the batch, and the length unless it is built in.

    Raises:
        FxfuseError: the model takes something other than tokens, or less than `seq` of them.
    """
    embedding = getattr(model, "tok_embeddings", None) or getattr(model, "token_embedding", None)
    parameters = inspect.signature(model.forward).parameters
    limit: Any = getattr(model, "max_seq_len", None)
    if not isinstance(embedding, torch.nn.Embedding) or next(iter(parameters), None) != "tokens":
        raise FxfuseError(
            f"no sample inputs are known for {type(model).__name__}({', '.join(parameters)})",
            hint="write a factory function that returns (model, args, kwargs, dynamic_shapes)",
        )
    # The text encoders add position embeddings or biases of their full length.
    fixed = hasattr(model, "position_embedding") or hasattr(model, "relative_position_bias")
    if fixed and seq not in (None, limit):
        raise FxfuseError(f"{type(model).__name__} takes {limit} tokens", where=f"--seq {seq}")
    batch = BATCH if batch is None else batch
    if seq is None:
        seq = int(limit) if fixed else min(SEQ, limit or SEQ)
    for option, value in (("--batch", batch), ("--seq", seq)):
        if value < 2:
            raise FxfuseError("a dimension that varies needs a sample of at least 2", where=f"{option} {value}")
    if limit is not None and seq > limit:
        raise FxfuseError(f"the model takes at most {limit} tokens", where=f"--seq {seq}")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, embedding.num_embeddings, (batch, seq), generator=generator)
    return (tokens,), {"tokens": {0: "batch"} if fixed else {0: "batch", 1: "sequence"}}


def _families() -> list[str]:
    check_installed("torchtune")
    try:
        import torchtune.models
    except ImportError as error:
        raise FxfuseError(f"torchtune cannot be imported: {error}", hint="pip install 'fxfuse[torchtune]'") from error
    return [module.name for module in pkgutil.iter_modules(torchtune.models.__path__)]


def _builders(module: Any) -> Iterator[tuple[str, Builder]]:
    for name in getattr(module, "__all__", ()):
        function = getattr(module, name)
        home = getattr(function, "__module__", "").rpartition(".")[2]
        if (
            inspect.isfunction(function)
            and home in ("_component_builders", "_model_builders")
            and not name.endswith(("_tokenizer", "_transform"))
        ):
            yield name, function


def _check_options(name: str, builder: Builder, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(builder).parameters
    for option in options:
        if option not in parameters:
            close = difflib.get_close_matches(option, parameters, n=3) or list(parameters)
            raise FxfuseError(
                f"{name} has no option {option!r}",
                where=f"torchtune:{name}",
                hint=f"it has {', '.join(close)}" if close else "it has none",
            )
    missing = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty and parameter.name not in options
    ]
    if missing:
        raise FxfuseError(
            f"{name} needs {', '.join(missing)}",
            where=f"torchtune:{name}",
            hint=" ".join(f"--set {parameter}=…" for parameter in missing),
        )


def _fill_empty(model: torch.nn.Module) -> None:
    """Draw weights that torchtune leaves uninitialised for a checkpoint: CLIP's position embedding is `torch.empty`."""
    position = getattr(model, "position_embedding", None)
    if isinstance(position, torch.nn.Parameter):
        with torch.no_grad():
            position.copy_(torch.randn(position.shape, generator=torch.Generator().manual_seed(2)) * 0.02)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _NoInit(TorchFunctionMode):
    """Skips the random initialisation of weights that a checkpoint is about to fill."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
