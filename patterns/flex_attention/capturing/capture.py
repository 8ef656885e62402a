"""`fxfuse.flex_capture`: within the block, torch.export takes flex_attention as the model has it.

with fxfuse.flex_capture():
    program = torch.export.export(model, args, dynamic_shapes=...)

`fxfuse.prepass`, `fxfuse.onnx.export` and the exporter plugin are within such a block by themselves. What each
replacement is for is said beside it; all of them end with the block.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from fxfuse.patches import Patch, applied, attribute, body, here, item
from fxfuse.patterns.flex_attention.capturing import arguments, libraries, one_block
from fxfuse.torch_seams import (
    FLEX_EMPTY_MASK,
    FLEX_VALIDATE_DEVICE,
    DispatchKey,
    below_autograd,
    detect_fake_mode,
    flex_operator_module,
    flex_wrapper,
    forget_compiled,
    forget_dispatch,
    torch_flex,
    uncached,
)

Function = Callable[..., Any]


def flex_capture() -> AbstractContextManager[None]:
    """Within the block ``torch.export.export`` captures flex_attention, and masks are made without block lists.

    What fails or is specialised otherwise, and is captured: q, k and v that require grad; `create_block_mask` in
    `forward` at a dynamic length; a mask function that reads tensors while batch and length are dynamic; a `BlockMask`
    among the arguments; flex_attention that the model, transformers or TorchTune compiles itself.

    A mask that is made within the block, in `forward` or before, has one block of any size and its mask function:
    what it computes is the same, and no length is kept. As an argument such a mask has one input for each tensor that
    its function captured, and the program can be called with a mask of another length that was made within a block.

    Blocks nest, and hold for the thread that is within them.
    """
    return applied(_patches)


def _patches() -> Iterator[Patch]:
    operator = torch.ops.higher_order.flex_attention
    yield body(torch_flex.create_block_mask, _create_block_mask)
    yield _within(FLEX_EMPTY_MASK, one_block.create_empty_block_mask)
    yield attribute(torch_flex, FLEX_VALIDATE_DEVICE, _validate_device(getattr(torch_flex, FLEX_VALIDATE_DEVICE)))
    yield attribute(torch_flex, "setup_compilation_env", _setup_compilation_env(torch_flex.setup_compilation_env))
    yield attribute(
        flex_operator_module, "trace_flex_attention", _trace_flex_attention(flex_operator_module.trace_flex_attention)
    )
    yield item(
        operator.py_kernels,
        DispatchKey.Autograd,
        _forward_only(operator.py_kernels[DispatchKey.Autograd]),
        lambda: forget_dispatch(operator, DispatchKey.Autograd),
    )
    yield arguments.block_masks_as_pytrees()
    if "torchtune" in sys.modules:
        yield from libraries.torchtune()
    if "transformers.masking_utils" in sys.modules:
        yield from libraries.transformers()


def _create_block_mask(*args: Any, **kwargs: Any) -> Any:
    """Torch's pads, sums and sorts blocks of the lengths: guards, 120 nodes, and `aten.sort.stable`, which no ONNX
    exporter takes."""
    from fxfuse.patches import here, originals
    from fxfuse.patterns.flex_attention.capturing.one_block import create_block_mask

    return create_block_mask(*args, **kwargs) if here() else originals["create_block_mask"](*args, **kwargs)


def _validate_device(original: Function) -> Function:
    """It refuses q, k and v on the CPU that require grad, as there is no backward kernel; a capture runs none."""

    def validate_device(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if not (torch.compiler.is_exporting() and here()):
            original(query, key, value)

    return validate_device


def _setup_compilation_env(original: Function) -> Function:
    """Outside dynamo flex_attention compiles a wrapper of its operator, to find what the mods captured.

    Dynamo keeps what it compiled, and asks an exported program's symbols whether they fit its guards, which
    specialises them; and an eager call may meet what a capture compiled, with its modes. Neither finds anything.
    """
    wrapper = flex_wrapper()

    @contextmanager
    def setup_compilation_env() -> Iterator[Any]:
        capturing = torch.compiler.is_exporting() and here()
        if capturing:
            forget_compiled(wrapper)
        try:
            with original() as backend:
                yield backend
        finally:
            if capturing:
                forget_compiled(wrapper)

    return setup_compilation_env


def _trace_flex_attention(original: Function) -> Function:
    """Where the mods are traced: without the cache of fake tensors.

    Of a view at a symbolic size the cache asks whether it fits its storage, and tracing that multiplies three sizes at
    once, which `operator.mul` does not take (`FakeTensorMode._get_output_tensor_from_cache_entry` in
    torch/_subclasses/fake_tensor.py, `_build_proxy_for_sym_expr` in torch/fx/experimental/proxy_tensor.py).
    """

    def trace_flex_attention(proxy_mode: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        mode = detect_fake_mode(query)
        if mode is None or not here():
            return original(proxy_mode, query, *args, **kwargs)
        with uncached(mode):
            return original(proxy_mode, query, *args, **kwargs)

    return trace_flex_attention


def _forward_only(original: Function) -> Function:
    """A capture traces no backward: the joint graph of the mods, which autograd asks for, fails on captured tensors."""

    def forward_only(*args: Any, **kwargs: Any) -> Any:
        if not (torch.compiler.is_exporting() and here()):
            return original(*args, **kwargs)
        with below_autograd():
            return torch.ops.higher_order.flex_attention(*args, **kwargs)

    return forward_only


def _within(name: str, replacement: Function) -> Patch:
    """`replacement` for a function of torch's flex_attention module, in this thread."""
    original = vars(torch_flex)[name]

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return replacement(*args, **kwargs) if here() else original(*args, **kwargs)

    return attribute(torch_flex, name, chosen)
