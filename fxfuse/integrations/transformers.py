"""The export format ``"fxfuse"`` of transformers: `OnnxExporter` with standard fused operators in its graphs.

import fxfuse.integrations.transformers                                   # makes the name known
from transformers.exporters import AutoExportConfig, AutoHfExporter

config = AutoExportConfig.from_dict({"export_format": "fxfuse", "dynamic": True})
exporter = AutoHfExporter.from_config(config)
exported = exporter.export_for_generation(model, {"input_ids": ids, "attention_mask": mask}, config)
exported.save_pretrained("llama-onnx")                            # prefill.onnx, decode.onnx, export.json, config.json

Names of inputs and outputs are those of `OnnxExporter`, and so is what is saved: it loads as format ``"onnx"``, where
fxfuse is not installed too. Needs transformers 5.23 or later (``pip install 'fxfuse[transformers]'``).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fxfuse.errors import FxfuseError
from fxfuse.installed import check_installed
from fxfuse.onnx.plugin import enabled
from fxfuse.ops.opsets import check_opset
from fxfuse.options import BUDGET, DEFAULT_OPSET, Options
from fxfuse.quiet import quiet
from fxfuse.recognise.answers import Pattern

check_installed("transformers")
try:
    from transformers.exporters import ExportedModel, ExportFormat, OnnxConfig, OnnxExporter, register_backend
    from transformers.exporters.runners.runner_onnx import OnnxModelRunner
except ImportError as error:
    raise FxfuseError(
        f"transformers' exporters cannot be imported: {error}",
        where="fxfuse.integrations.transformers",
        hint="pip install 'fxfuse[transformers]'; they came with transformers 5",
    ) from error

NAME = "fxfuse"
"""The export format."""


@dataclass
class FxfuseConfig(OnnxConfig):  # type: ignore[misc]
    """`OnnxConfig` at opset 24; `patterns`, `prove`, `accept` and `budget` are those of `fxfuse.onnx.export`.

    Raises:
        FxfuseError: an opset without the fused operators, `ort_fusions`, or an option that is none.
    """

    export_format: str = NAME
    opset_version: int | None = DEFAULT_OPSET
    patterns: Sequence[Pattern] | None = None
    prove: Literal["on", "off"] = "on"
    accept: Sequence[str] = ()
    budget: float = BUDGET
    strict_fusion: bool = False
    """`strict` of `fxfuse.onnx.export`; the field `strict` is torch.export's."""
    of_patterns: Mapping[str, Any] = field(default_factory=dict)
    """Options of single patterns, by keyword: ``{"windows": "attributes"}``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.opset_version is None:
            self.opset_version = DEFAULT_OPSET
        check_opset(self.opset_version)
        Options.given(**self.fusing())
        if self.ort_fusions is not None:
            raise FxfuseError(
                "ort_fusions writes operators of ONNX Runtime's own, fxfuse the standard ones",
                where="ort_fusions",
                hint='leave it out, or use export_format="onnx"',
            )

    def fusing(self) -> dict[str, Any]:
        """Keywords of `fxfuse.onnx.enabled`."""
        return {
            "patterns": self.patterns,
            "prove": self.prove,
            "accept": self.accept,
            "budget": self.budget,
            "strict": self.strict_fusion,
            **self.of_patterns,
        }


class FxfuseExporter(OnnxExporter):  # type: ignore[misc]
    """`OnnxExporter`, with every graph fused. `fxfuse.report` of a component's program says what became of it."""

    export_format = NAME
    config_class = FxfuseConfig
    tested_versions: ClassVar[dict[str, str]] = {}
    """transformers warns where its own exporter was tested with others; what fxfuse works with, pip knows."""

    def export_program(
        self, model: Any, sample_inputs: MutableMapping[str, Any], config: FxfuseConfig
    ) -> tuple[Any, Any]:
        with enabled(**config.fusing()), quiet():
            program: tuple[Any, Any] = super().export_program(model, sample_inputs, config)
        return program

    def export(self, *args: Any, **kwargs: Any) -> ExportedModel:
        return _as_onnx(super().export(*args, **kwargs))

    def export_for_generation(self, *args: Any, **kwargs: Any) -> ExportedModel:
        return _as_onnx(super().export_for_generation(*args, **kwargs))


def _as_onnx(exported: ExportedModel) -> ExportedModel:
    """Saved under the name of a format that every transformers can load."""
    exported.export_format = ExportFormat.ONNX
    return exported


register_backend(FxfuseExporter, OnnxModelRunner)
