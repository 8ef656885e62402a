"""``optimum-cli export fxfuse``, run as a user runs it. Needs an environment of its own: see ``.ci/optimum``."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, T5Config
from transformers.models.auto import AutoModel

pytest.importorskip("optimum.commands", reason="Optimum is tested in an environment of its own: .ci/optimum")

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CACHE = {
    "optimum": ("past_key_values.{}.{}", "present.{}.{}"),
    "genai": ("past_key_values.{}.{}", "present.{}.{}"),
    "hf": ("input.past_key_values.layers.{}.{}s", "output.past_key_values.layers.{}.{}s"),
}


def optimum_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("optimum-cli")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


def test_it_is_a_command_of_optimum() -> None:
    shown = optimum_cli("export", "fxfuse", "--help")
    assert shown.returncode == 0 and "--names {optimum,genai,hf}" in shown.stdout


@pytest.mark.parametrize("names", ["genai", "hf"])
def test_names(names: str, llama: Path, tmp_path: Path) -> None:
    ran = optimum_cli("export", "fxfuse", "-m", llama, tmp_path, "--names", names)
    assert ran.returncode == 0, ran.stderr
    check_names(onnx.load(tmp_path / "model.onnx").graph, names)


def check_names(graph: onnx.GraphProto, names: str) -> None:
    caches = [[name.format(layer, what) for layer in (0, 1) for what in ("key", "value")] for name in CACHE[names]]
    assert [i.name for i in graph.input] == ["input_ids", "attention_mask", "position_ids", *caches[0]]
    assert [o.name for o in graph.output] == ["logits", *caches[1]]


@pytest.fixture(scope="module")
def exported(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "new"
    ran = optimum_cli("export", "fxfuse", "-m", llama, out)
    assert ran.returncode == 0, ran.stderr
    assert "RMSNormalization  5 fused" in ran.stdout and "Attention         2 fused" in ran.stdout
    return out


def test_the_graph_is_fused_and_standard(exported: Path) -> None:
    model = onnx.load(exported / "model.onnx")
    check_names(model.graph, "optimum")
    counts = Counter(node.op_type for node in model.graph.node)
    assert [counts[n] for n in ("RMSNormalization", "RotaryEmbedding", "Attention")] == [5, 4, 2]
    assert {node.domain for node in model.graph.node} == {""}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 24)] and not model.functions
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["input_ids"] == shapes["position_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 8]
    assert shapes["logits"] == ["batch_size", "sequence_length", 64]
    assert shapes["present.0.key"] == ["batch_size", 2, "past_sequence_length + sequence_length", 8]


def test_the_folder_is_a_models(exported: Path) -> None:
    assert {"model.onnx", "model.onnx.data", "config.json", "generation_config.json"} <= {
        path.name for path in exported.iterdir()
    }
    assert not [path for path in exported.iterdir() if path.name.startswith(".")]
    assert AutoConfig.from_pretrained(exported).model_type == "llama"


def test_it_generates_what_the_model_does(llama: Path, exported: Path) -> None:
    """One graph: an empty cache first, then the cache that it returned."""
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    ids = torch.randint(1, 64, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    past = {i.name: torch.zeros(3, 2, 0, 8) for i in session.get_inputs()[3:]}
    tokens, new = ids, ids
    for _ in range(8):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        feed = {"input_ids": new, "attention_mask": mask, "position_ids": positions, **past}
        logits, *present = session.run(None, {name: value.numpy() for name, value in feed.items()})
        past = dict(zip(past, map(torch.from_numpy, present), strict=True))
        new = torch.from_numpy(logits[:, -1:]).argmax(-1)
        tokens, mask = torch.cat([tokens, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes(dtype: str, llama: Path, tmp_path: Path) -> None:
    ran = optimum_cli("export", "fxfuse", "-m", llama, tmp_path, "--dtype", dtype)
    assert ran.returncode == 0, ran.stderr
    graph = onnx.load(tmp_path / "model.onnx").graph
    weights = {tensor.data_type for tensor in graph.initializer if tensor.name.endswith(".weight")}
    assert weights == {getattr(onnx.TensorProto, dtype.upper())}


def test_bad_input_is_named_and_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    t5 = AutoModel.from_config(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    t5.save_pretrained(tmp_path / "t5")
    cases = [
        (("-m", tmp_path / "missing"), "the configuration cannot be read"),
        (("-m", tmp_path / "t5"), "T5Model is an encoder–decoder"),
        (("-m", llama, "--opset", 22), "not in opset 22"),
        (("-m", llama, "--dtype", "float17"), "float17"),
    ]
    for arguments, said in cases:
        ran = optimum_cli("export", "fxfuse", *arguments, tmp_path / "out")
        assert ran.returncode == 2, ran.stderr
        assert said in ran.stderr and "Traceback" not in ran.stderr
        assert not (tmp_path / "out").exists()
