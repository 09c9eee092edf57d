"""The products under the module name of FlashInfer's page: `cugemm.gemm` stands for `flashinfer.gemm`."""

from cugemm.api.dense import (
    bmm_bf16,
    bmm_fp8,
    fp8_blockscale_gemm_sm90,
    gemm_fp8_nt_blockscaled,
    gemm_fp8_nt_groupwise,
    mm_bf16,
    mm_fp4,
    mm_fp8,
)
from cugemm.api.grouped import SegmentGEMMWrapper
from cugemm.api.tgv import tgv_gemm, tgv_gemm_sm100

__all__ = [
    "SegmentGEMMWrapper",
    "bmm_bf16",
    "bmm_fp8",
    "fp8_blockscale_gemm_sm90",
    "gemm_fp8_nt_blockscaled",
    "gemm_fp8_nt_groupwise",
    "mm_bf16",
    "mm_fp4",
    "mm_fp8",
    "tgv_gemm",
    "tgv_gemm_sm100",
]
