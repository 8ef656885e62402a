"""``fxfuse export --cache``: graphs that generate, from a builder of torchtune or a checkpoint of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from fxfuse.cli import main
from fxfuse.cli.generation import special_tokens
from fxfuse.errors import FxfuseError

SIZES = {
    "vocab_size": 64,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "max_seq_len": 32,
    "intermediate_dim": 48,
}
LLAMA = ["torchtune:llama3_2", *(word for name, value in SIZES.items() for word in ("--set", f"{name}={value}"))]


@pytest.mark.parametrize("form", ["growing", "static"])
def test_a_decoder_of_torchtune(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is compared with eager PyTorch over a padded prompt and the steps after it before it is written."""
    out = tmp_path / "llama"
    pair = ["--pair"] if form == "static" else []
    code = main(["export", *LLAMA, "--cache", form, *pair, "--out", str(out)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert f"a {form} cache" in printed.out and "step 3" in printed.out
    manifest = json.loads((out / "fxfuse.json").read_text())
    assert manifest["cache"]["form"] == form and manifest["model"]["heads"] == 4
    for name in ("prefill.onnx", "decode.onnx") if pair else ("model.onnx",):
        operators = [node.op_type for node in onnx.load(out / name, load_external_data=False).graph.node]
        assert operators.count("TensorScatter") == (2 if form == "static" else 0)


def test_the_tokens_that_a_checkpoint_names(tmp_path: Path) -> None:
    assert special_tokens(None) == special_tokens(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"eos_token_id": [3, 4], "pad_token_id": 0}')
    assert special_tokens(tmp_path) == {"pad": 0, "bos": None, "eos": [3, 4]}
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(FxfuseError, match="not a configuration"):
        special_tokens(tmp_path)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["package.module:function", "--cache", "static"], "--cache is for a model that generates text"),
        ([*LLAMA, "--cache", "static", "--seq", "4"], "--seq does not apply"),
        ([*LLAMA, "--cache", "static", "--flex-attention", "preview"], "--flex-attention does not apply"),
        ([*LLAMA, "--cache", "static", "--opset", "23"], "opset 24"),
    ],
)
def test_options_that_do_not_fit(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert named in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_an_encoder_has_no_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "embed_dim=32 mlp_dim=64 num_heads=4 head_dim=8 num_layers=1 rel_pos_num_buckets=8 rel_pos_max_dist=16"
    options = [w for o in f"{sizes} vocab_size=40 norm_eps=1e-6 max_seq_len=64".split() for w in ("--set", o)]
    assert main(["export", "torchtune:t5_encoder", *options, "--cache", "static", "--out", str(tmp_path / "out")]) == 2
    assert "T5Encoder is no decoder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
