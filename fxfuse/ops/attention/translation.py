"""Attention as one ONNX node, of the opset that is exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fxfuse.errors import FxfuseError
from fxfuse.ops.attention.arguments import Attributes, Inputs
from fxfuse.ops.outputs import one_node

DEFAULTS = Attributes()._asdict()


def make_translation(count: int) -> Callable[[int], Callable[..., Any]]:
    """The translation that gives the first `count` outputs of an Attention node."""

    def for_opset(opset: int) -> Callable[..., Any]:
        import onnx_ir as ir
        from onnxscript.onnx_opset import opset23, opset24

        op = opset24 if opset >= 24 else opset23

        def attention(
            Q: Any,
            K: Any,
            V: Any,
            attn_mask: Any = None,
            past_key: Any = None,
            past_value: Any = None,
            nonpad_kv_seqlen: Any = None,
            *,
            is_causal: int = 0,
            kv_num_heads: int = 0,
            q_num_heads: int = 0,
            qk_matmul_output_mode: int = 0,
            scale: float | None = None,
            softcap: float = 0.0,
            softmax_precision: int | None = None,
            left_window_size: int = -1,
            right_window_size: int = -1,
        ) -> Any:
            if nonpad_kv_seqlen is not None and opset < 24:
                raise FxfuseError(
                    f"Attention takes nonpad_kv_seqlen from opset 24 on, the export asks for {opset}",
                    where="nonpad_kv_seqlen",
                    hint="export with opset_version=24",
                )
            windows = {"left_window_size": left_window_size, "right_window_size": right_window_size}
            windows = {name: size for name, size in windows.items() if size >= 0}
            if windows and opset < 25:
                raise FxfuseError(
                    f"Attention takes windows from opset 25 on, the export asks for {opset}",
                    where=next(iter(windows)),
                    hint="export with opset_version=25",
                )
            inputs = Inputs(Q, K, V, attn_mask, past_key, past_value, nonpad_kv_seqlen)
            a = Attributes(
                is_causal, kv_num_heads, q_num_heads, qk_matmul_output_mode, scale, softcap, softmax_precision
            )
            if len(Q.shape) == 4:
                # Four dims say it themselves, and opset 25 forbids to repeat it.
                a = a._replace(q_num_heads=0, kv_num_heads=0)
            outputs = one_node(op.Attention, inputs, a._asdict(), DEFAULTS)
            # Put there by hand: onnxscript's Attention is that of the onnx release which it is used with.
            node = (outputs[0] if isinstance(outputs, Sequence) else outputs).producer()
            for name, size in windows.items():
                node.attributes[name] = ir.AttrInt64(name, size)
            return outputs[0] if count == 1 else tuple(outputs[:count])

        return attention

    return for_opset
