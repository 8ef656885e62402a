"""Every README: its examples, each under a ``<!-- runs: name -->``, run as they stand there, and its links."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchtune.models.llama3_2 import llama3_2
from transformers import LlamaConfig, LlamaForCausalLM

import fxfuse
from fxfuse.ops import holds_fused
from fxfuse.recognise.catalogue import unregister
from tests.patterns.flex_attention.models import MaskInside

ROOT = Path(__file__).parent.parent
ROOMS = ("fxfuse", "patterns", "tests")
READMES = [ROOT / "README.md", *(readme for room in ROOMS for readme in sorted((ROOT / room).rglob("*README.md")))]
FOUND = [
    (readme, *block)
    for readme in READMES
    for block in re.findall(r"<!-- runs: (\w+) -->\n```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)
]
BLOCKS = {name: block for _, name, block in FOUND}
ALL = {"RMSNormalization": 3, "RotaryEmbedding": 2, "Attention": 1}
"""A TorchTune Llama of one layer."""
Names = dict[str, Any]


def fused(names: Names) -> None:
    assert fxfuse.report(names["fused"]).counts == ALL


def exported(names: Names) -> None:
    assert fxfuse.report(names["onnx"]).counts == ALL and Path("model.onnx").is_file()


def by_table(names: Names) -> None:
    assert ALL.items() <= Counter(node.op_type for node in names["onnx"].model.graph).items()


def verified(names: Names) -> None:
    assert names["verification"].operators == ALL


def plugin(names: Names) -> None:
    assert fxfuse.report(names["onnx"]).counts == ALL
    assert "RotaryEmbedding" in {node.op_type for node in onnx.load("model.onnx").graph.node}


def prepass(names: Names) -> None:
    assert fxfuse.report(names["fused"]).counts == ALL
    assert fxfuse.report(names["onnx"]).counts == {"RMSNormalization": 3}
    assert names["onnx"].model.opset_imports == {"": 23}


def transformers(names: Names) -> None:
    prefill, decode = (fxfuse.report(c.program).counts for c in names["exported"].components.values())
    assert prefill == ALL and decode == {**ALL, "KVCache": 1}
    written = {"prefill.onnx", "decode.onnx", "export.json", "config.json"}
    assert written <= {path.name for path in Path("llama-onnx").iterdir()}


def onward(names: Names) -> None:
    assert holds_fused(torch.export.load("fused.pt2")) and not holds_fused(names["plain"])
    assert all(weight.grad is not None for weight in names["model"].parameters())


def pattern(names: Names) -> None:
    class Feed(torch.nn.Module):
        def forward(self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            return F.linear(x, up) * F.gelu(F.linear(x, gate))

    inputs = (torch.randn(3, 4), torch.randn(5, 4), torch.randn(5, 4))
    program = fxfuse.fuse(torch.export.export(Feed(), inputs), patterns=[names["geglu"]])
    assert fxfuse.report(program).counts == {"geglu": 1}
    assert torch.ops.mine.geglu.default in {node.target for node in program.graph.nodes}


def outside(names: Names) -> None:
    called = [(node.domain, node.op_type) for node in names["onnx"].model.graph]
    assert called == [("mine", "AddLayerNorm"), ("", "Relu"), ("", "Add")]
    assert ("mine", "AddLayerNorm", "") in names["onnx"].model.functions
    names["add_layer_norm"].unregister()


def trace(names: Names) -> None:
    assert names["region"].names == ("sum_1", "mul", "add") and names["evidence"].draws > 4
    called = [str(node.target) for node in names["fused"].graph.nodes if node.op == "call_function"]
    assert called == ["mine.centre.default", "aten.relu.default"]
    assert fxfuse.report(names["fused"]).counts == {"Centre": 1}


def flex(names: Names) -> None:
    (entry,) = fxfuse.report(names["fused"])
    assert entry.status == "fused" and entry.parameters["is_causal"] == 1
    assert entry.parameters["boolean mask"] == "[B, 1, S, T]"


def preview(names: Names) -> None:
    (entry,) = fxfuse.report(names["onnx"]).fused()
    assert entry.operator == "Attention" and names["onnx"].model.opset_imports[""] == 25


def declared(names: Names) -> None:
    assert fxfuse.report(names["fused"]).counts == {"RMSNormalization": 3}
    assert fxfuse.report(names["left"]).counts == {}


def options(names: Names) -> None:
    (entry,), (same,) = fxfuse.report(names["fused"]), fxfuse.report(names["same"])
    assert entry.status == "fused" and (same.operator, same.parameters) == (entry.operator, entry.parameters)


def lifted(names: Names) -> None:
    assert names["state"].target == "count" and names["y"].tolist() == [2.0, 2.0]
    assert names["after"] == {names["state"].placeholder: torch.ones(1)}


def decoder(names: Names) -> None:
    assert names["session"].manifest.cache.form == "static"
    assert [len(row) for row in names["tokens"]] == [8, 8] and len(names["endless"]) == 100
    cache = names["stream"].manifest.cache
    assert (cache.form, cache.max_length) == ("streaming", 8)


CHECKS: dict[str, Callable[[Names], None]] = {
    "fuse": fused,
    "export": exported,
    "installed": plugin,
    "table": by_table,
    "verify": verified,
    "plugin": plugin,
    "prepass": prepass,
    "transformers": transformers,
    "onward": onward,
    "pattern": pattern,
    "outside": outside,
    "trace": trace,
    "lifted": lifted,
    "decoder": decoder,
    "flex": flex,
    "preview": preview,
    "options": options,
    "declared": declared,
}
"""What must be true after a block."""


def test_every_block_is_checked() -> None:
    assert BLOCKS.keys() == CHECKS.keys() and len(BLOCKS) == len(FOUND)
    assert sum(readme.read_text().count("```python") for readme in READMES) == len(FOUND)


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: str(readme.relative_to(ROOT)))
def test_links_lead_somewhere(readme: Path) -> None:
    text = readme.read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        path, _, heading = link.partition("#")
        target = readme.parent / path if path else readme
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], link


def test_the_picture_is_of_a_layer_as_it_is() -> None:
    """The counts in the README's drawing, and the operators that it shows after fusing."""
    model = llama3_2(vocab_size=1000, num_layers=2, num_heads=8, num_kv_heads=2, embed_dim=256, max_seq_len=512).eval()
    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    program = torch.export.export(model, (torch.zeros(2, 5, dtype=torch.int64),), dynamic_shapes=shapes)
    layer = fxfuse.report(fxfuse.fuse(program)).layer
    assert layer is not None and layer.whole and layer.module == "layers.0"
    assert f"{len(layer.before)} operations before, and {len(layer.after)} after" in READMES[0].read_text()
    drawn = [call.label for call in layer.after if call.fused]
    assert drawn == ["rms_norm", "rotary_embedding", "rotary_embedding", "attention", "rms_norm"]


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    added = x + residual
    return F.layer_norm(added, weight.shape, weight, bias, eps), added


@pytest.fixture
def an_operator_of_the_readers() -> Iterator[None]:
    library = torch.library.Library("mine", "DEF")
    library.define("geglu(Tensor x, Tensor w_gate, Tensor w_up) -> Tensor")
    library.impl("geglu", lambda x, gate, up: F.gelu(x @ gate.T) * (x @ up.T), "CompositeExplicitAutograd")
    library.define("centre(Tensor x) -> Tensor")
    library.impl("centre", lambda x: x - x.mean(-1, keepdim=True), "CompositeExplicitAutograd")
    library.define(
        "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)"
    )
    library.impl("add_layer_norm", _add_layer_norm, "CompositeExplicitAutograd")
    yield
    unregister("geglu")
    library._destroy()


@pytest.mark.usefixtures("an_operator_of_the_readers")
@pytest.mark.parametrize("block", CHECKS)
def test_an_example_of_the_readme(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = llama3_2(
        vocab_size=32, num_layers=1, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=64, intermediate_dim=48
    ).eval()
    if "from_pretrained" in BLOCKS[block]:
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        LlamaForCausalLM(config).save_pretrained("llama")
    names: Names = {"model": model, "tokens": torch.arange(10).reshape(2, 5)}
    if "document_ids" in BLOCKS[block]:
        names |= {"model": MaskInside(), "x": torch.randn(2, 40, 16), "document_ids": torch.arange(80).view(2, 40) // 9}
    written, module = tmp_path / f"{block}.py", ModuleType(f"readme_{block}")
    written.write_text(BLOCKS[block])  # onnxscript reads the source of its functions, and looks into their module
    module.__dict__.update(names)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(BLOCKS[block], str(written), "exec"), module.__dict__)
    CHECKS[block](module.__dict__)
