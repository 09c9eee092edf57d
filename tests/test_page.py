"""The API page's examples, word for word, with `import flashinfer` meaning cugemm: shapes, dtypes and numbers.

Without a GPU, "cuda:0" means the CPU: `Tensor.to` and `device=` are patched while an example runs. On a GPU they run as written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cugemm

torch = pytest.importorskip("torch")

MM_FP4 = """
import torch
import flashinfer

batch_size = 8
hidden_size = 4096
intermediate_size = 11008

# 准备输入
x = torch.randn(batch_size, hidden_size).half().to("cuda:0")

# FP4 量化权重（实际应用中从模型加载）
weight_fp4 = torch.randint(0, 255, (hidden_size, intermediate_size), 
                            dtype=torch.uint8, device="cuda:0")
weight_scale = torch.randn(intermediate_size).half().to("cuda:0")

# FP4 GEMM
output = flashinfer.mm_fp4(x, weight_fp4, weight_scale)
"""  # noqa: W291

BMM_FP8 = """
import torch
import flashinfer

batch_size = 8
hidden_size = 4096
intermediate_size = 11008

# 批量 FP8 GEMM
x = torch.randn(batch_size, hidden_size).half().to("cuda:0")
weight_fp8 = torch.randn(hidden_size, intermediate_size).half().to("cuda:0")
weight_scale = torch.randn(intermediate_size).half().to("cuda:0")

output = flashinfer.bmm_fp8(x, weight_fp8, weight_scale)
"""

SEGMENTS = """
import torch
import flashinfer

batch_size = 8
hidden_size = 4096
intermediate_size = 11008
num_experts = 8

# 创建分组 GEMM 包装器
gemm_wrapper = flashinfer.SegmentGEMMWrapper(
    num_experts=num_experts,
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    device="cuda:0"
)

# 准备输入
x = torch.randn(batch_size, hidden_size).half().to("cuda:0")
expert_weights = torch.randn(
    num_experts, hidden_size, intermediate_size
).half().to("cuda:0")
expert_indices = torch.randint(0, num_experts, (batch_size,)).int().to("cuda:0")

# 执行分组 GEMM
output = gemm_wrapper.forward(x, expert_weights, expert_indices)
"""

TGV = """
import torch
import flashinfer

# TGV GEMM 用于 SM100+ 架构
a = torch.randn(1024, 4096).half().to("cuda:0")
b = torch.randn(4096, 11008).half().to("cuda:0")

output = flashinfer.tgv_gemm_sm100(a, b)
"""

LAYER = '''
import torch
import flashinfer

class QuantizedLinearLayer:
    def __init__(self, in_features, out_features, use_fp8=True):
        self.in_features = in_features
        self.out_features = out_features
        self.use_fp8 = use_fp8
        
        if use_fp8:
            # FP8 权重（实际应用中需要量化）
            self.weight = torch.randn(in_features, out_features).half().to("cuda:0")
            self.weight_scale = torch.ones(out_features).half().to("cuda:0")
        else:
            # FP4 权重
            self.weight = torch.randint(0, 255, (in_features, out_features),
                                      dtype=torch.uint8, device="cuda:0")
            self.weight_scale = torch.ones(out_features).half().to("cuda:0")
    
    def forward(self, x):
        """前向传播"""
        if self.use_fp8:
            return flashinfer.bmm_fp8(x, self.weight, self.weight_scale)
        else:
            return flashinfer.mm_fp4(x, self.weight, self.weight_scale)

# 使用示例
layer = QuantizedLinearLayer(4096, 11008, use_fp8=True)
x = torch.randn(8, 4096).half().to("cuda:0")
output = layer.forward(x)
print(f"输出形状: {output.shape}")  # torch.Size([8, 11008])
'''  # noqa: W293

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture
def cuda_is_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch calls that say "cuda:0" get the CPU."""

    def here(name: Any) -> Any:
        return "cpu" if str(name).startswith("cuda") else name

    def redirected(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **how: make(*args, **{key: here(value) if key == "device" else value for key, value in how.items()})

    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **how: to(self, *map(here, args), **how))
    for name in ("randn", "randint", "ones"):
        monkeypatch.setattr(torch, name, redirected(getattr(torch, name)))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Execute an example and give its variables; every large product on the way may say that it runs on the host."""
    if request.param == "cpu":
        request.getfixturevalue("cuda_is_cpu")
    monkeypatch.setitem(sys.modules, "flashinfer", cugemm)

    def execute(example: str) -> dict[str, Any]:
        torch.manual_seed(len(example))
        names: dict[str, Any] = {"__name__": "example"}
        exec(compile(example, "example", "exec"), names)
        if request.param == "cuda":
            assert names["output"].is_cuda
        return names

    return execute


def f64(x: Any) -> np.ndarray[Any, Any]:
    """A float tensor as float64."""
    return x.detach().cpu().double().numpy()


def e4m3(x: Any) -> np.ndarray[Any, Any]:
    """Values rounded to e4m3, saturating, as float64."""
    return np.clip(f64(x), -448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def check(output: Any, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], scale: np.ndarray[Any, Any] | float = 1.0) -> None:
    """output = (a @ b) * scale, half. The bound: fp32 sums (truncating tensor cores), then half a step of fp16."""
    assert output.dtype == torch.float16
    assert tuple(output.shape) == (a.shape[0], b.shape[1])
    assert output.is_contiguous()
    exact = (a @ b) * scale
    sums = (np.abs(a) @ np.abs(b)) * np.abs(scale)
    bound = np.abs(exact) * 2.0**-11 + 2.0**-25 + (3 * a.shape[1] + 40) * 2.0**-24 * sums
    largest = np.abs(exact).max()
    assert 0 < largest < 65504 - largest * 2.0**-10, "the example must not overflow half, or this test proves little"
    assert (np.abs(f64(output) - exact) <= bound).all()


def test_mm_fp4(run: Callable[[str], dict[str, Any]]) -> None:
    """One code per byte in the low nibble, the high nibble ignored, one scale per column."""
    v = run(MM_FP4)
    assert int(v["weight_fp4"].max()) > 15, "the example fills high nibbles too"
    check(v["output"], f64(v["x"]), E2M1[v["weight_fp4"].cpu().numpy() & 15], f64(v["weight_scale"]))


def test_bmm_fp8(run: Callable[[str], dict[str, Any]]) -> None:
    """The half weight is cast to e4m3, x stays half; 2-D operands give a 2-D result."""
    v = run(BMM_FP8)
    weight = e4m3(v["weight_fp8"])
    assert not np.array_equal(weight, f64(v["weight_fp8"]))
    check(v["output"], f64(v["x"]), weight, f64(v["weight_scale"]))


def test_segments(run: Callable[[str], dict[str, Any]]) -> None:
    v = run(SEGMENTS)
    output, indices = v["output"], v["expert_indices"].cpu().numpy()
    assert output.dtype == torch.float16
    assert tuple(output.shape) == (8, 11008)
    assert len(set(indices)) > 1
    for i, expert in enumerate(indices):  # one row at a time: the weights are 1.4 GB in float32
        check(output[i : i + 1], f64(v["x"][i : i + 1]), f64(v["expert_weights"][expert]))


def test_tgv(run: Callable[[str], dict[str, Any]]) -> None:
    v = run(TGV)
    check(v["output"], f64(v["a"]), f64(v["b"]))


def test_layer(run: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    v = run(LAYER)
    assert capsys.readouterr().out == "输出形状: torch.Size([8, 11008])\n"
    check(v["output"], f64(v["x"]), e4m3(v["layer"].weight))
    layer = v["QuantizedLinearLayer"](512, 320, use_fp8=False)
    x = v["x"][:, :512]
    check(layer.forward(x), f64(x), E2M1[layer.weight.cpu().numpy() & 15])


def test_names_of_the_page() -> None:
    """`flashinfer.gemm` is the page's module; its members are the objects of the top level."""
    for name in ("mm_fp4", "mm_fp8", "bmm_fp8", "tgv_gemm_sm100", "SegmentGEMMWrapper"):
        assert getattr(cugemm.gemm, name) is getattr(cugemm, name)
        assert getattr(cugemm, name).__doc__
    assert cugemm.SegmentGEMMWrapper.forward is cugemm.SegmentGEMMWrapper.run


def test_mm_fp8(run: Callable[[str], dict[str, Any]]) -> None:
    """The page names it without an example: float8 operands, scales by keyword."""
    v = run(
        "import torch, flashinfer\n"
        "a = torch.randn(8, 512).to('cuda:0').to(torch.float8_e4m3fn)\n"
        "w = torch.randn(320, 512).to('cuda:0').to(torch.float8_e4m3fn)\n"
        "s = torch.rand(320).to('cuda:0')\n"
        "output = flashinfer.mm_fp8(a, w.T, out_dtype=torch.float16, a_scale=0.5, b_scale=s)\n"
    )
    check(v["output"], f64(v["a"].float()), f64(v["w"].float()).T, 0.5 * f64(v["s"]))
