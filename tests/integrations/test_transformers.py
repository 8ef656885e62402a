"""transformers' own exporters: the format "fxfuse", and `OnnxExporter` under the plugin."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from transformers import DynamicCache, Gemma2Config, LlamaConfig, PreTrainedModel, Qwen3Config
from transformers.exporters import AutoExportConfig, AutoHfExporter, ExportedModel, OnnxConfig, OnnxExporter
from transformers.models.auto import AutoModelForCausalLM

import fxfuse
import fxfuse.integrations.transformers
import fxfuse.onnx
from fxfuse.errors import FxfuseError, FxfuseWarning
from fxfuse.patterns.rms_norm import PATTERN as RMS_NORM
from fxfuse.versions import cache_name
from tests.torchtune.graphs import onnx_attentions, onnx_kv_heads, onnx_repeats

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
}
CONFIGS = {"llama": (LlamaConfig, 5), "qwen3": (Qwen3Config, 9), "gemma2": (Gemma2Config, 9)}
"""And how many norms there are: two or four a layer, two more where queries and keys have one, and the last."""
IDS = torch.randint(1, 64, (2, 5), generator=torch.Generator().manual_seed(0))


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name][0](**SIZES)).eval()


def sample() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS.clone(), "attention_mask": torch.ones_like(IDS)}


def by_name(**options: Any) -> tuple[Any, Any]:
    """An exporter and its configuration, as a user gets them."""
    config = AutoExportConfig.from_dict({"export_format": "fxfuse", "dynamic": True, **options})
    return AutoHfExporter.from_config(config), config


def check(model: ir.Model, norms: int, caches: int = 0) -> None:
    """All fused, in standard operators of opset 24, keys and values as they are."""
    counts = Counter(node.op_type for node in model.graph.all_nodes())
    expected = {"RMSNormalization": norms, "RotaryEmbedding": 4, "Attention": 2}
    assert {name: counts[name] for name in expected} == expected
    assert fxfuse.report(model).counts == expected | ({"KVCache": caches} if caches else {})
    assert {node.domain for node in model.graph.all_nodes()} == {""} and not model.functions
    assert model.opset_imports == {"": 24}
    for attention in onnx_attentions(model):
        assert onnx_kv_heads(attention) == 2 and not onnx_repeats(attention)


def greedy(exported: ExportedModel, model: PreTrainedModel, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Tokens of the prefill graph, then of the decode graph, in ONNX Runtime."""
    run, cache, called = exported.runners, DynamicCache(config=model.config), cache_name(model)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    out = run["prefill"](input_ids=ids, position_ids=positions, **{called: cache})
    tokens = [out.logits[:, -1:].argmax(-1)]
    for step in range(steps - 1):
        position = torch.full_like(tokens[-1], ids.shape[1] + step)
        out = run["decode"](input_ids=tokens[-1], position_ids=position, **{called: out[called]})
        tokens.append(out.logits[:, -1:].argmax(-1))
    return torch.cat([ids, *tokens], dim=1)


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3", "gemma2"))])
def test_prefill_and_decode(name: str) -> None:
    model = build(name)
    exporter, config = by_name()
    exported = exporter.export_for_generation(model, sample(), config)
    assert list(exported.components) == ["prefill", "decode"]
    for stage, component in exported.components.items():
        check(component.program, CONFIGS[name][1], caches=2 if stage == "decode" else 0)
    ids = torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(1))
    expected = model.generate(ids, max_new_tokens=7, do_sample=False)
    assert torch.equal(greedy(exported, model, ids, 7), expected)


@pytest.fixture(scope="module")
def one_graph() -> tuple[PreTrainedModel, ExportedModel]:
    model = build("llama")
    exporter, config = by_name()
    return model, exporter.export(model, sample(), config)


def test_one_graph_with_padding(one_graph: tuple[PreTrainedModel, ExportedModel]) -> None:
    model, exported = one_graph
    check(exported.program, 5)
    assert [value.name for value in exported.program.graph.inputs] == ["input_ids", "attention_mask"]
    ids = torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
    actual = exported(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()])


def test_what_is_saved_loads_without_fxfuse(one_graph: tuple[PreTrainedModel, ExportedModel], tmp_path: Path) -> None:
    _, exported = one_graph
    exported.save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / "export.json").read_text())
    assert manifest["export_format"] == "onnx"
    assert manifest["components"]["model"]["metadata"]["export_config"]["export_format"] == "fxfuse"
    program = (
        "import sys, torch; from transformers.exporters import ExportedModel; "
        "exported = ExportedModel.from_pretrained('.'); "
        f"ids = torch.tensor({IDS.tolist()}); "
        "print(exported(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.double().sum().item()); "
        "assert 'fxfuse' not in sys.modules"
    )
    there = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert there.returncode == 0, there.stderr
    assert float(there.stdout) == pytest.approx(exported(**sample()).logits.double().sum().item(), rel=1e-6)


def test_options() -> None:
    exporter, config = by_name(patterns=[RMS_NORM], prove="off", opset_version=23)
    exported = exporter.export(build("llama"), sample(), config)
    assert fxfuse.report(exported.program).counts == {"RMSNormalization": 5}
    assert exported.program.opset_imports == {"": 23}


@pytest.mark.parametrize(
    ("option", "value"), [("opset_version", 20), ("ort_fusions", "cpu"), ("patterns", ["rope"]), ("prove", "maybe")]
)
def test_bad_options_are_refused_at_once(option: str, value: Any) -> None:
    with pytest.raises(FxfuseError, match=option.partition("_version")[0]):
        by_name(**{option: value})


def test_their_own_exporter_fuses_under_the_plugin() -> None:
    with warnings.catch_warnings(), fxfuse.onnx.enabled():
        warnings.simplefilter("error", FxfuseWarning)
        exported = OnnxExporter().export(build("llama"), sample(), OnnxConfig(dynamic=True, opset_version=24))
    check(exported.program, 5)


@pytest.mark.slow
def test_their_own_exporter_for_generation_under_the_plugin() -> None:
    with fxfuse.onnx.enabled():
        config = OnnxConfig(dynamic=True, opset_version=24)
        exported = OnnxExporter().export_for_generation(build("llama"), sample(), config)
    for component in exported.components.values():
        check(component.program, 5)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.exporters", None)
    monkeypatch.delitem(sys.modules, "fxfuse.integrations.transformers")
    with pytest.raises(FxfuseError, match=r"pip install 'fxfuse\[transformers\]'"):
        importlib.import_module("fxfuse.integrations.transformers")
