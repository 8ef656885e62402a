"""What ``optimum-cli export fxfuse`` does, without the command, which is tested where Optimum is installed."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from fxfuse.errors import FxfuseError, FxfuseWarning
from fxfuse.integrations.optimum import export_pretrained
from tests.pretrained.checkpoints import DECODER, T5, TEXT, configured, copied, save


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {**DECODER, "num_hidden_layers": 1}
    return save("LlamaForCausalLM", tmp_path_factory.mktemp("llama"), options, torch.bfloat16)


def test_bfloat16_becomes_what_a_cpu_runs(llama: Path, tmp_path: Path) -> None:
    with pytest.warns(FxfuseWarning, match="written in float32: the checkpoint is in bfloat16"):
        report = export_pretrained(str(llama), str(tmp_path))
    assert report.counts["Attention"] == 1
    weights = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    assert onnx.TensorProto.BFLOAT16 not in {weight.data_type for weight in weights}


def test_what_is_not_whole_or_no_decoder(llama: Path, tmp_path: Path) -> None:
    headless = copied(llama, tmp_path / "headless", lambda weights: weights.pop("lm_head.weight"))
    cases = {
        headless: "not in the checkpoint.*lm_head.weight",
        configured("T5ForConditionalGeneration", tmp_path / "t5", T5): "is an encoder–decoder",
        configured("BertForMaskedLM", tmp_path / "bert", TEXT): "BertForMaskedLM does not generate text",
    }
    for folder, said in cases.items():
        with pytest.raises(FxfuseError, match=said):
            export_pretrained(str(folder), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
