"""``optimum-cli export fxfuse``.

Optimum imports every ``register_*.py`` of this namespace when its command line starts, so nothing heavy is imported
here before the command runs.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class FxfuseExportCommand(BaseOptimumCLICommand):
    """A causal language model as one ONNX graph of standard fused operators, with its cache."""

    COMMAND = CommandInfo(name="fxfuse", help="Export a text generation model to ONNX with standard fused operators.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("-m", "--model", required=True, help="a folder with a model, or its name on the Hub")
        parser.add_argument("output", help="the folder to write")
        parser.add_argument("--opset", type=int, default=24, help="23, 24 or 25; ONNX Runtime's kernels end at 24")
        parser.add_argument(
            "--names",
            choices=("optimum", "genai", "hf"),
            default="optimum",
            help="what the cache's inputs and outputs are called: past_key_values.0.key and present.0.key "
            "(optimum, genai), or as transformers' own exporters call them (hf)",
        )
        dtypes = ("auto", "float32", "float16", "bfloat16")
        parser.add_argument(
            "--dtype",
            choices=dtypes,
            default="auto",
            help="auto is what the model is in, or float32 where ONNX Runtime's CPU provider does not run that",
        )
        parser.add_argument(
            "--allow-missing", action="store_true", help="go on where weights are missing, unused, or of other shapes"
        )
        parser.add_argument(
            "--accept",
            action="append",
            default=[],
            metavar="NAME",
            help="overrule a refusal, by the name that the report gives it: clamp@model.py:12; repeatable",
        )
        parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS", help="of looking for more to fuse")
        parser.add_argument("--strict", action="store_true", help="leave norms that differ on rows below 1e-6")
        parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")

    def run(self) -> None:
        from fxfuse.errors import FxfuseError, ParityError
        from fxfuse.integrations.optimum import export_pretrained

        try:
            report = export_pretrained(
                self.args.model,
                self.args.output,
                opset=self.args.opset,
                names=self.args.names,
                dtype=self.args.dtype,
                trust_remote_code=self.args.trust_remote_code,
                allow_missing=self.args.allow_missing,
                accept=self.args.accept,
                budget=self.args.budget,
                strict=self.args.strict,
            )
        except FxfuseError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(3 if isinstance(error, ParityError) else 2) from None
        print(report)


REGISTER_COMMANDS = [(FxfuseExportCommand, ExportCommand)]
