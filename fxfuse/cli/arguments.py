"""What the command line takes."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

from fxfuse.cli import commands
from fxfuse.cli.parity import parity
from fxfuse.cli.two_programs import verify
from fxfuse.ops import OPS
from fxfuse.options import BUDGET
from fxfuse.recognise.catalogue import catalogue
from fxfuse.recognise.declared import keywords
from fxfuse.repair.file import rules

SOURCES = """\
SOURCE is one of
  torchtune:BUILDER       a model of torchtune by its builder's name: torchtune:llama3_2_1b, torchtune:gemma2
  FOLDER                  a checkpoint of transformers: config.json, weights, tokenizer. What is exported is the class
                          that config.json names: a language model with its cache (export only), or an encoder
  FILE.pt2                a program saved with torch.export.save
  PACKAGE.MODULE:NAME     a function that returns (model, args[, kwargs[, dynamic_shapes]])

exit codes: 0 done; 2 bad input; 3 the exported model does not compute what the original does
"""

PARITY = """\
Without SOURCE it is the operators that are compared, over a matrix of types, layouts, shapes and options. Without a
GPU Triton's kernels run in its interpreter.

""" + SOURCES.replace("3 the exported model does not compute what the original does", "3 an implementation is wrong")

_REPAIRS = """\
both files are then run against each other in ONNX Runtime

exit codes: 0 done, or nothing to mend; 2 bad input; 3 the mended model does not compute what the original does
"""

PROGRAMS = """\
ORIGINAL is fused again and every region proven; each node of FUSED has to compute a value that is proven, and what it
returns and writes has to be ORIGINAL's. Weights, constants, sizes and their ranges are compared too. Nothing that the
run which made FUSED wrote of it is read.

exit codes: 0 proven; 2 bad input; 3 the two differ, or could not be proven to be the same
"""


OPERATORS = ", ".join(sorted({op.onnx_name for op in OPS.values()}))


def mended() -> str:
    """What `fxfuse repair` mends, by what each rule says of itself."""
    return "\n".join(["mended are", *(f"  {rule.what}" for rule in rules()), _REPAIRS])


def parser() -> argparse.ArgumentParser:
    """The parser; `run` of the parsed arguments is the command."""
    top = argparse.ArgumentParser(
        prog="fxfuse",
        description=f"Recognise {OPERATORS} in a PyTorch model, however they are written, and export it to ONNX.",
    )
    subparsers = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: commands.Command, summary: str, epilog: str | None = None) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    export = command("export", commands.export, "fuse a model, prove it, write it as ONNX and compare it", SOURCES)
    _source(export)
    export.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder for model.onnx, its weights and report.json"
    )
    export.add_argument(
        "--package",
        choices=["fxfuse", "genai"],
        help="what is to run a model that generates text (default fxfuse; genai: onnxruntime-genai as well)",
    )
    export.add_argument(
        "--cache",
        choices=["auto", "growing", "static", "sliding", "streaming"],
        help="the cache of a model that generates text (default auto, which is growing); for torchtune's, which are "
        "exported without one else, it asks for one",
    )
    export.add_argument(
        "--sinks", type=int, metavar="N", help="of --cache streaming, how many of the first tokens are kept (default 4)"
    )
    export.add_argument(
        "--window", type=int, metavar="W", help="of --cache streaming, which needs it, how many of the last are kept"
    )
    export.add_argument(
        "--names",
        choices=["optimum", "genai", "hf"],
        help="what the inputs and outputs of a model that generates text are called (default genai, which is as "
        "optimum: past_key_values.0.key; hf: input.past_key_values.layers.0.keys)",
    )
    export.add_argument("--pair", action="store_true", help="a graph for prompts and one for single tokens")
    export.add_argument("--no-parity", dest="parity", action="store_false", help="do not compare with eager")
    inspect = command("inspect", commands.inspect, "fuse a model and report; export nothing", SOURCES)
    _source(inspect)
    repair = command("repair", commands.repair, "mend an ONNX file on disk whose fused operators do not run", mended())
    repair.add_argument("model", type=Path, metavar="MODEL", help="an ONNX file of opset 23 or later")
    repair.add_argument("--out", required=True, type=Path, metavar="FILE", help="the file to write")
    repair.add_argument("--no-parity", dest="parity", action="store_false", help="do not run it against the original")
    check = command("verify", verify, "prove a fused program against its original again, from the two files", PROGRAMS)
    check.add_argument("original", type=Path, metavar="ORIGINAL.pt2", help="the program as torch.export captured it")
    check.add_argument("fused", type=Path, metavar="FUSED.pt2", help="the program that fxfuse.fuse made of it")
    check.add_argument("--report", type=Path, metavar="FILE", help="also write what was proven here, as .json")
    command("patterns", commands.patterns, "list the catalogue")
    compare = command("parity", parity, "compare eager, composite, Triton and ONNX Runtime with float64", PARITY)
    _model(compare, "?")
    compare.add_argument("--json", type=Path, metavar="FILE", help="also write every comparison here")
    compare.add_argument("--op", action="append", default=[], metavar="NAME", help="only this operator; repeatable")
    compare.add_argument("--full", action="store_true", help="every combination of the matrix, not a sample of it")
    compare.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    compare.add_argument("--plot", type=Path, metavar="FILE", help="also draw the errors: .png or .svg")
    return top


def _source(sub: argparse.ArgumentParser) -> None:
    _model(sub, None)
    _of_patterns(sub)
    sub.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="NAME",
        help="overrule a refusal, by the name that the report gives it: clamp@model.py:12; repeatable",
    )
    sub.add_argument(
        "--quantize",
        metavar="SCHEME",
        help="round the weights of linear layers by torchao before anything else: int2 to int8, with :block=N or "
        ":block=row and :symmetric, as in int4:block=32:symmetric",
    )
    sub.add_argument(
        "--quantize-embedding",
        metavar="SCHEME",
        help="with --quantize, those of embeddings (default none; an output that is tied to one shares its scheme)",
    )
    sub.add_argument(
        "--quantize-head",
        metavar="SCHEME",
        help="with --quantize, those of the output, or none (default as --quantize)",
    )
    _budget(sub)
    sub.add_argument(
        "--report",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="also write the report here: a page (.html) or data (.json); repeatable",
    )


class _OfPattern(argparse.Action):
    """Keeps the option of a pattern beside those of other patterns, apart from the command's own."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        namespace.of_patterns = {**namespace.of_patterns, self.dest: values}


def _of_patterns(sub: argparse.ArgumentParser) -> None:
    """The options that the patterns of the catalogue declare."""
    sub.set_defaults(of_patterns={})
    for one in keywords(catalogue()).values():
        told = f"{one.help} (default {one.default})".replace("%", "%%")
        with suppress(argparse.ArgumentError):  # the command has a flag of that name: in Python there is the keyword
            sub.add_argument(
                one.flag,
                dest=one.keyword,
                action=_OfPattern,
                choices=one.values,
                default=argparse.SUPPRESS,
                help=told,
            )


def _budget(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        metavar="SECONDS",
        help=f"how long to look for more to fuse (default {BUDGET:g})",
    )
    sub.add_argument(
        "--strict",
        action="store_true",
        help="leave norms that bound what they divide by (F.normalize): an epsilon differs on rows below 1e-6",
    )


def _model(sub: argparse.ArgumentParser, nargs: str | None) -> None:
    sub.add_argument("source", metavar="SOURCE", nargs=nargs, help="the model; see below")
    sub.add_argument("--opset", type=int, default=24, help="ONNX opset, 23 to 25 (default 24)")
    sub.add_argument(
        "--dtype",
        help="float32, float16 or bfloat16 (default: float32, or what the source has; of a checkpoint's folder, "
        "if ONNX Runtime's CPU provider runs that, or else float32)",
    )
    sub.add_argument(
        "--set",
        dest="options",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the builder or factory, as a Python literal; repeatable",
    )
    sub.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="weights: safetensors, .pt, .pth or .bin, whole or sharded"
    )
    sub.add_argument(
        "--allow-missing",
        action="store_true",
        help="of a checkpoint's folder: go on where weights are missing (and then random), unused, or of other shapes",
    )
    sub.add_argument(
        "--batch", type=int, help="batch size of the sample inputs of a torchtune model or an encoder (default 2)"
    )
    sub.add_argument("--seq", type=int, help="their length (default 16)")
