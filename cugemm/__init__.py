"""cugemm: low-precision matrix products for inference, from any array framework, on NVIDIA GPUs since Ampere."""

from cugemm import gemm
from cugemm.api.dense import (
    bmm_bf16,
    bmm_fp8,
    fp8_blockscale_gemm_sm90,
    gemm_fp8_nt_blockscaled,
    gemm_fp8_nt_groupwise,
    linear,
    matmul,
    mm_bf16,
    mm_fp4,
    mm_fp8,
)
from cugemm.api.grouped import SegmentGEMMWrapper
from cugemm.api.quantize import dequantize, quantize
from cugemm.api.tgv import tgv_gemm, tgv_gemm_sm100
from cugemm.arrays import Spec
from cugemm.errors import CaptureError, CompileError, CudaError, HostWarning, NoKernelError
from cugemm.layers import QuantizedLinear
from cugemm.plan import Plan, explain, plan, warmup
from cugemm.quantized import Quantized

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "CompileError",
    "CudaError",
    "HostWarning",
    "NoKernelError",
    "Plan",
    "Quantized",
    "QuantizedLinear",
    "SegmentGEMMWrapper",
    "Spec",
    "bmm_bf16",
    "bmm_fp8",
    "dequantize",
    "explain",
    "fp8_blockscale_gemm_sm90",
    "gemm",
    "gemm_fp8_nt_blockscaled",
    "gemm_fp8_nt_groupwise",
    "linear",
    "matmul",
    "mm_bf16",
    "mm_fp4",
    "mm_fp8",
    "plan",
    "quantize",
    "tgv_gemm",
    "tgv_gemm_sm100",
    "warmup",
]
