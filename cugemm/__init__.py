"""cugemm: low-precision matrix products for inference, from any array framework, on NVIDIA GPUs since Ampere."""

from cugemm import gemm
from cugemm.api.block_dequantize import e2m1_and_ufp8sf_scale_to_float, mxfp4_dequantize, mxfp4_dequantize_host, mxfp8_dequantize_host
from cugemm.api.block_quantize import (
    fp4_quantize,
    make_nvfp4_global_scale,
    mxfp4_quantize,
    mxfp8_quantize,
    nvfp4_batched_quantize,
    nvfp4_quantize,
    nvfp4_quantize_smooth,
    silu_and_mul_nvfp4_quantize,
)
from cugemm.api.block_scaled import bmm_mxfp8, mm_bf16_fp4, mm_fp4, mm_mxfp8, prepare_bf16_fp4_weights
from cugemm.api.deepgemm import fp8_gemm_nt, m_grouped_fp8_gemm_nt_contiguous, m_grouped_fp8_gemm_nt_masked
from cugemm.api.dense import bmm_bf16, linear, matmul, mm_bf16
from cugemm.api.fp8 import (
    bmm_fp8,
    fp8_blockscale_gemm_sm90,
    gemm_fp8_nt_blockscaled,
    gemm_fp8_nt_groupwise,
    mm_fp8,
    prepare_low_latency_gemm_weights,
)
from cugemm.api.group_quantize import mxfp8_grouped_quantize, per_token_group_quant_8bit, scaled_fp4_grouped_quantize
from cugemm.api.grouped import SegmentGEMMWrapper
from cugemm.api.grouped_flashinfer import (
    batch_deepgemm_fp8_nt_groupwise,
    group_deepgemm_fp8_nt_groupwise,
    group_gemm_fp8_nt_groupwise,
    group_gemm_mxfp4_nt_groupwise,
    group_gemm_mxfp8_mxfp4_nt_groupwise,
    group_gemm_nvfp4_nt_groupwise,
    grouped_mm_bf16,
    grouped_mm_fp4,
    grouped_mm_fp8,
    grouped_mm_mxfp8,
    moe_gemm_fp8_nt_groupwise,
)
from cugemm.api.grouped_masked import grouped_gemm_nt_masked
from cugemm.api.grouped_matmul import grouped_matmul
from cugemm.api.quantize import dequantize, quantize
from cugemm.api.rowwise import combine, silu_and_mul
from cugemm.api.shuffle import block_scale_interleave, nvfp4_block_scale_interleave, shuffle_matrix_a, shuffle_matrix_sf_a
from cugemm.api.svdquant import mm_nvfp4_svdquant, svdquant_linear
from cugemm.api.tgv import mm_M1_16_K6144_N256, mm_M1_16_K7168_N128, mm_M1_16_K7168_N256, tgv_gemm, tgv_gemm_sm100, tinygemm_bf16
from cugemm.arrays import Spec
from cugemm.errors import CaptureError, CompileError, CudaError, HostWarning, NoKernelError
from cugemm.layers import QuantizedLinear
from cugemm.plan import Plan, explain, plan, warmup
from cugemm.quantized import Quantized
from cugemm.scale_layout import SfLayout

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
    "SfLayout",
    "Spec",
    "batch_deepgemm_fp8_nt_groupwise",
    "block_scale_interleave",
    "bmm_bf16",
    "bmm_fp8",
    "bmm_mxfp8",
    "combine",
    "dequantize",
    "e2m1_and_ufp8sf_scale_to_float",
    "explain",
    "fp4_quantize",
    "fp8_blockscale_gemm_sm90",
    "fp8_gemm_nt",
    "gemm",
    "gemm_fp8_nt_blockscaled",
    "gemm_fp8_nt_groupwise",
    "group_deepgemm_fp8_nt_groupwise",
    "group_gemm_fp8_nt_groupwise",
    "group_gemm_mxfp4_nt_groupwise",
    "group_gemm_mxfp8_mxfp4_nt_groupwise",
    "group_gemm_nvfp4_nt_groupwise",
    "grouped_gemm_nt_masked",
    "grouped_matmul",
    "grouped_mm_bf16",
    "grouped_mm_fp4",
    "grouped_mm_fp8",
    "grouped_mm_mxfp8",
    "linear",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "make_nvfp4_global_scale",
    "matmul",
    "mm_M1_16_K6144_N256",
    "mm_M1_16_K7168_N128",
    "mm_M1_16_K7168_N256",
    "mm_bf16",
    "mm_bf16_fp4",
    "mm_fp4",
    "mm_fp8",
    "mm_mxfp8",
    "mm_nvfp4_svdquant",
    "moe_gemm_fp8_nt_groupwise",
    "mxfp4_dequantize",
    "mxfp4_dequantize_host",
    "mxfp4_quantize",
    "mxfp8_dequantize_host",
    "mxfp8_grouped_quantize",
    "mxfp8_quantize",
    "nvfp4_batched_quantize",
    "nvfp4_block_scale_interleave",
    "nvfp4_quantize",
    "nvfp4_quantize_smooth",
    "per_token_group_quant_8bit",
    "plan",
    "prepare_bf16_fp4_weights",
    "prepare_low_latency_gemm_weights",
    "quantize",
    "scaled_fp4_grouped_quantize",
    "shuffle_matrix_a",
    "shuffle_matrix_sf_a",
    "silu_and_mul",
    "silu_and_mul_nvfp4_quantize",
    "svdquant_linear",
    "tgv_gemm",
    "tgv_gemm_sm100",
    "tinygemm_bf16",
    "warmup",
]
