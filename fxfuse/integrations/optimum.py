"""What ``optimum-cli export fxfuse`` does; the command is a distribution of its own, ``integrations/optimum`` here."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import onnx_ir as ir
import torch

import fxfuse
from fxfuse.decoder.export import export_decoder
from fxfuse.decoder.names import Names
from fxfuse.errors import FxfuseError, FxfuseWarning, ParityError, callers_level
from fxfuse.files import move_into, staging
from fxfuse.ops.opsets import check_opset
from fxfuse.options import BUDGET, DEFAULT_OPSET
from fxfuse.parity import OnnxRuntime, compare, float32_twin
from fxfuse.pretrained import dtype_for_cpu, load, look
from fxfuse.pretrained.dtypes import FOR_A_CPU, NO_BFLOAT16
from fxfuse.report import Report

MODEL = "model.onnx"
Dtype = Literal["auto", "float32", "float16", "bfloat16"]


def export_pretrained(
    model: str,
    out: str,
    *,
    opset: int = DEFAULT_OPSET,
    names: Names = "optimum",
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    allow_missing: bool = False,
    accept: Sequence[str] = (),
    budget: float = BUDGET,
    strict: bool = False,
) -> Report:
    """Writes ``model.onnx`` (its weights beside it), the configurations and the tokenizer to the folder `out`.

    The graph is compared with the model in ONNX Runtime, a prefill and a decoding step, before anything is written.

    Args:
        model: a folder, or the name of a model on the Hub.
        names: see `fxfuse.decoder.export`.
        dtype: of the weights; "auto" is what the checkpoint is in, where ONNX Runtime's CPU provider runs that, or else
            float32.
        allow_missing: go on where weights are missing (and then random), unused, or of other shapes.
        accept: refusals to overrule by name; see `fxfuse.fuse`.
        budget: seconds after which the search for more to fuse ends; see `fxfuse.fuse`.
        strict: is nothing fused that differs on the smallest rows? See `fxfuse.fuse`.

    Raises:
        FxfuseError: a model that cannot be loaded whole or exported, or a folder that cannot be written.
        ParityError: ONNX Runtime computes something else.
    """
    check_opset(opset)
    if dtype not in get_args(Dtype):
        raise FxfuseError(f"unknown dtype={dtype!r}", where="dtype", hint=" or ".join(get_args(Dtype)))
    holds = look(model, trust_remote_code=trust_remote_code, local=False)
    if not holds.generates:
        raise FxfuseError(
            f"{holds.cls.__name__} does not generate text",
            where=model,
            hint="fxfuse export FOLDER writes it as it is, without a cache",
        )
    chosen, note = dtype_for_cpu(holds.config, None if dtype == "auto" else getattr(torch, dtype))
    loaded, notes = load(holds, chosen, allow_missing=allow_missing, local=False)
    for text in (*notes, note, NO_BFLOAT16 + FOR_A_CPU if chosen == torch.bfloat16 else None):
        if text is not None:
            warnings.warn(text, FxfuseWarning, stacklevel=callers_level())
    program = export_decoder(loaded, opset=opset, names=names, accept=accept, budget=budget, strict=strict)
    target = Path(out)
    with staging(target, MODEL) as folder:
        ir.save(program, folder / MODEL, external_data=MODEL + ".data")
        check_parity(loaded, folder / MODEL)
        loaded.config.save_pretrained(folder)
        loaded.generation_config.save_pretrained(folder)
        with suppress(OSError, ValueError):  # there may be no tokenizer
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code).save_pretrained(folder)
        move_into(folder, target, model=MODEL)
    return fxfuse.report(program)


@torch.no_grad()
def check_parity(model: Any, path: Path) -> None:
    """Compares logits of a prompt, padded at the left, and of what follows it, with those of one eager call.

    Raises:
        ParityError: ONNX Runtime computes something else.
    """
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(0, size, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    counts = "position_ids" not in inspect.signature(model.forward).parameters  # along attention_mask, by itself
    given = {} if counts else {"position_ids": positions}
    expected = model(input_ids=ids, attention_mask=mask, **given).logits
    with tempfile.TemporaryDirectory() as folder:
        dtype = model.dtype
        if dtype == torch.bfloat16:  # for which ONNX Runtime's CPU provider has no kernels
            dtype, twin = torch.float32, Path(folder) / MODEL
            float32_twin(path, twin)
            path = twin
        run = OnnxRuntime(path)
        caches = [i for i in run.session.get_inputs() if len(i.shape) == 4]
        past = [torch.zeros(3, int(i.shape[1]), 0, int(i.shape[3]), dtype=dtype) for i in caches]
        for part in (slice(0, 6), slice(6, 8)):
            standing = [] if counts else [positions[:, part]]
            logits, *past = run(ids[:, part], mask[:, : part.stop], *standing, *past)
            seen = mask[:, part].bool()
            result = compare([expected[:, part][seen]], [logits[seen]])
            if not result.passed:
                raise ParityError(f"ONNX Runtime does not give the model's logits: {result.reason}", where=str(path))
