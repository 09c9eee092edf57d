"""The products under the module name of FlashInfer's page: `cugemm.gemm` stands for `flashinfer.gemm`."""

from cugemm.api.block_quantize import nvfp4_quantize_smooth
from cugemm.api.block_scaled import bmm_mxfp8, mm_bf16_fp4, mm_fp4, mm_mxfp8, prepare_bf16_fp4_weights
from cugemm.api.deepgemm import fp8_gemm_nt, m_grouped_fp8_gemm_nt_contiguous, m_grouped_fp8_gemm_nt_masked
from cugemm.api.dense import bmm_bf16, mm_bf16
from cugemm.api.fp8 import (
    bmm_fp8,
    fp8_blockscale_gemm_sm90,
    gemm_fp8_nt_blockscaled,
    gemm_fp8_nt_groupwise,
    mm_fp8,
    prepare_low_latency_gemm_weights,
)
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
from cugemm.api.svdquant import mm_nvfp4_svdquant, svdquant_linear
from cugemm.api.tgv import mm_M1_16_K6144_N256, mm_M1_16_K7168_N128, mm_M1_16_K7168_N256, tgv_gemm, tgv_gemm_sm100, tinygemm_bf16

__all__ = [
    "SegmentGEMMWrapper",
    "batch_deepgemm_fp8_nt_groupwise",
    "bmm_bf16",
    "bmm_fp8",
    "bmm_mxfp8",
    "fp8_blockscale_gemm_sm90",
    "fp8_gemm_nt",
    "gemm_fp8_nt_blockscaled",
    "gemm_fp8_nt_groupwise",
    "group_deepgemm_fp8_nt_groupwise",
    "group_gemm_fp8_nt_groupwise",
    "group_gemm_mxfp4_nt_groupwise",
    "group_gemm_mxfp8_mxfp4_nt_groupwise",
    "group_gemm_nvfp4_nt_groupwise",
    "grouped_gemm_nt_masked",
    "grouped_mm_bf16",
    "grouped_mm_fp4",
    "grouped_mm_fp8",
    "grouped_mm_mxfp8",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
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
    "nvfp4_quantize_smooth",
    "prepare_bf16_fp4_weights",
    "prepare_low_latency_gemm_weights",
    "svdquant_linear",
    "tgv_gemm",
    "tgv_gemm_sm100",
    "tinygemm_bf16",
]
