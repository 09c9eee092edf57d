"""Products of block-scaled formats under FlashInfer's names: mxfp8, nvfp4, mxfp4, and 16-bit activations times fp4 weights.

Loose scales are bytes in tiles of 128 rows x 4 blocks, as FlashInfer's quantisers return them: a shape cannot tell tiles from rows. Linear
ones need scale_layout="linear" or a `Quantized`, which says how its scales lie.
"""

from __future__ import annotations

import functools
from typing import Any

from cugemm.api.common import choice, dtype_of, flag, gemm_options, is_float16, product, shape_of
from cugemm.api.rehearsal import spec_of
from cugemm.arrays import SPEC, framework_of, is_scalar
from cugemm.formats import E2M1, E2M1X2, E4M3, E8M0, FP32, LAYOUTS
from cugemm.problem import A_SCALE, B_SCALE, FLOATS4, FLOATS8, FLOATS16, GemmOp, GemmOptions
from cugemm.problem import product as register
from cugemm.quantized import Quantized
from cugemm.scale_layout import padded
from cugemm.scales import Covered, ceil_div, read_bytes

_DESCALES = {"a_scale": "a_descale", "b_scale": "b_descale"}
_MM_MXFP8 = register("mm_mxfp8", FLOATS8, FLOATS8, called=_DESCALES)
_BMM_MXFP8 = register(
    "bmm_mxfp8",
    FLOATS8,
    FLOATS8,
    ranks=(2, 3),
    called={"a": "A", "b": "B", "a_scale": "A_scale", "b_scale": "B_scale", "out_dtype": "dtype"},
)
_MM_FP4 = register("mm_fp4", (*FLOATS16, E2M1X2.name), FLOATS4, called=_DESCALES)
_MM_BF16_FP4 = register("mm_bf16_fp4", ("bf16",), (E2M1X2.name,), called=_DESCALES)
_PREPARE = GemmOp("prepare_bf16_fp4_weights", ("b", "b_descale", "alpha"), (), ())

_MXFP8_BACKENDS = ("cutlass", "cute-dsl", "cudnn", "b12x")
_BMM_MXFP8_BACKENDS = ("cudnn", "cutlass")
_FP4_BACKENDS = ("cudnn", "cutlass", "cute-dsl", "b12x")
_W4A16_BACKENDS = ("cudnn", "cute-dsl")
_BYTES = ("uint8", E4M3.dtype, E8M0.dtype)


def mm_mxfp8(
    a: Any,
    b: Any,
    a_descale: Any = None,
    b_descale: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    use_8x4_sf_layout: bool = False,
    backend: str = "auto",
    *,
    scale_layout: str = "128x4",
    skip_check: bool = False,
) -> Any:
    """out[m, n] = sum over k of a[m, k] * 2^(a_descale[m, k/32] - 127) * b[k, n] * 2^(b_descale[k/32, n] - 127).

    a [m, k], b [k, n]: float8_e4m3fn or float8_e5m2, any mix and layout (b is usually the transposed view of a weight [n, k]), or
    Quantized, which bring their scales.
    a_descale, b_descale: e8m0 codes, uint8 or float8_e8m0fnu, as `mxfp8_quantize` returns them: 128x4 tiles, 1-D or [padded rows, padded
    blocks], rows being those of a and the columns of b (under JAX not .T, which copies). use_8x4_sf_layout: those of a lie in 8x4 tiles.
    scale_layout="linear": a_descale [m, ceil(k/32)], b_descale [ceil(k/32), n].
    out_dtype: default bfloat16. backend: FlashInfer's names mean "auto", except "trtllm" (ValueError: it reads b shuffled). skip_check:
    changes nothing. No multiple of anything is asked of m, n or k.

    Errors: as `linear`; a scale of any other size. Numerics: values times their scales are exact in bfloat16 for scale codes 3 to 246, sums
    are fp32. Source: FlashInfer `mm_mxfp8`, OCP MX.

    >>> out = cugemm.mm_mxfp8(a, w.T, *scales)
    """
    _refuse_shuffled(_MM_MXFP8, backend)
    layout, scale_layout = _in_words(_layouts, "mm_mxfp8", scale_layout, use_8x4_sf_layout)
    _refuse_turned(_MM_MXFP8, A_SCALE, a, a_descale, 32, layout)
    _refuse_turned(_MM_MXFP8, B_SCALE, b, b_descale, 32, scale_layout)
    options = gemm_options(_MM_MXFP8, out_dtype, backend, _MXFP8_BACKENDS)
    options = _read_a(options, E8M0.name, layout)
    options = _read_b(options, E8M0.name, scale_layout)
    return product(_MM_MXFP8, a, b, options, a_scale=a_descale, b_scale=b_descale, out=out)


def bmm_mxfp8(
    A: Any,
    B: Any,
    A_scale: Any = None,
    B_scale: Any = None,
    dtype: Any = None,
    out: Any = None,
    backend: str = "auto",
    *,
    scale_layout: str = "128x4",
    skip_check: bool = False,
) -> Any:
    """out[i, m, n] = sum over k of A[i, m, k] * 2^(A_scale - 127) * B[i, k, n] * 2^(B_scale - 127), one scale for each 32 values along k.

    A [batch, m, k], B [batch, k, n]: float8_e4m3fn or float8_e5m2, any mix and layout; a batch of 1 broadcasts, 2-D operands give a 2-D
    result. Or Quantized, each matrix of which has tiles of its own.
    A_scale, B_scale: e8m0 codes as `mxfp8_quantize` returns them for A and for the weight [batch, n, k]: 128x4 tiles over all batch * m
    (batch * n) rows, one matrix after the other without padding between. scale_layout="linear": [batch, m, ceil(k/32)] and
    [batch, ceil(k/32), n].
    dtype: default bfloat16. backend: FlashInfer's names mean "auto". skip_check: changes nothing.

    Errors and numerics: as `mm_mxfp8`. Source: FlashInfer `bmm_mxfp8`.

    >>> out = cugemm.bmm_mxfp8(A, W.swapaxes(1, 2), A_scale, W_scale, "bfloat16")
    """
    _, scale_layout = _in_words(_layouts, "bmm_mxfp8", scale_layout, False)
    _refuse_turned(_BMM_MXFP8, A_SCALE, A, A_scale, 32, scale_layout)
    _refuse_turned(_BMM_MXFP8, B_SCALE, B, B_scale, 32, scale_layout)
    rows = "" if scale_layout == "linear" else "flat"
    options = gemm_options(_BMM_MXFP8, dtype, backend, _BMM_MXFP8_BACKENDS)
    options = _read_a(options, E8M0.name, scale_layout, rows="" if type(A) is Quantized else rows)
    options = _read_b(options, E8M0.name, scale_layout, rows="" if type(B) is Quantized else rows)
    return product(_BMM_MXFP8, A, B, options, a_scale=A_scale, b_scale=B_scale, out=out)


def mm_fp4(
    a: Any,
    b: Any,
    a_descale: Any = None,
    b_descale: Any = None,
    alpha: Any = None,
    out_dtype: Any = None,
    out: Any = None,
    block_size: int = 16,
    use_8x4_sf_layout: bool = False,
    backend: str = "auto",
    use_nvfp4: bool = True,
    enable_pdl: bool = True,
    *,
    scale_layout: str = "128x4",
    skip_check: bool = False,
) -> Any:
    """out[m, n] = alpha * sum over k of (e2m1(a[m, k]) * a_descale[m, k/s]) * (e2m1(b[k, n]) * b_descale[k/s, n]), s = block_size.

    a [m, k/2], b [k/2, n] (usually the transposed view of [n, k/2]): uint8 or float4_e2m1fn_x2, two codes a byte along k, low nibble =
    even k; or Quantized, which bring their scales.
    a_descale, b_descale: bytes in 128x4 tiles as `nvfp4_quantize` and `mxfp4_quantize` return them, rows being those of a and the columns
    of b: [padded rows, padded blocks], 1-D, or b_sf.T (under JAX as returned: there .T copies). use_nvfp4: e4m3 scales, block_size 16;
    False: mxfp4, e8m0 scales, block_size 32. use_8x4_sf_layout: the scales of a lie in 8x4 tiles. scale_layout="linear":
    a_descale [m, ceil(k/s)], b_descale [ceil(k/s), n]. alpha: float or one element, for nvfp4 the product of both tensor scales.
    16-bit activations: a [m, k] bfloat16 or float16 takes no a_descale; b_descale holds block scales as above, or floats, one or per
    column [n] or [1, n]; `mm_fp4(a, b, s)` is short for b_descale=s. With floats b may also be [k, n], one code in the low nibble of each
    byte.
    out_dtype: default bfloat16, or a's dtype if it is 16-bit. backend: FlashInfer's names mean "auto", except "trtllm" (ValueError: it
    reads b shuffled). enable_pdl: `pdl` of `linear`. skip_check: changes nothing.

    Errors: as `linear`; a scale of any other size. Numerics: e2m1 times e4m3 is exact in 16 bits, e2m1 times 2^e in bfloat16; sums in
    fp32. Source: FlashInfer `mm_fp4`, NVIDIA NVFP4, OCP MX.

    >>> out = cugemm.mm_fp4(a, b.T, a_sf, b_sf.T, alpha)
    """
    _refuse_shuffled(_MM_FP4, backend)
    layout, scale_layout = _in_words(_layouts, "mm_fp4", scale_layout, use_8x4_sf_layout)
    element = _in_words(_element, "mm_fp4", use_nvfp4, block_size)
    weights_only = is_float16(a)
    if type(b) is Quantized:
        if b_descale is not None or (weights_only and a_descale is not None):
            raise TypeError("mm_fp4: b is a Quantized, which has its own scale; drop a_descale and b_descale.")
    elif weights_only:
        if a_descale is not None and b_descale is not None:
            raise TypeError(f"mm_fp4: a is {dtype_of(a)}, which takes no a_descale; pass mm_fp4(a, b, scale_of_b).")
        a_descale, b_descale = None, (b_descale if a_descale is None else a_descale)
        if b_descale is None:
            raise TypeError(
                "mm_fp4: b_descale is missing; fp4 codes mean nothing without scales: pass mm_fp4(a, b, scale_of_b), or a Quantized b."
            )
    elif b_descale is None:
        raise TypeError(
            f"mm_fp4: b_descale is missing; a is {_shown(a)}, fp4 activations, which need block scales on both sides. For bfloat16 or "
            "float16 activations pass a unquantised: mm_fp4(a, b, scale_of_b)."
        )
    if weights_only and use_8x4_sf_layout:
        raise ValueError("mm_fp4: use_8x4_sf_layout is True, but 16-bit activations have no block scales; drop it.")
    options = gemm_options(_MM_FP4, out_dtype, backend, _FP4_BACKENDS, how=_pdl("mm_fp4", enable_pdl))
    if not weights_only:
        _refuse_turned(_MM_FP4, A_SCALE, a, a_descale, block_size, layout, 2)
        options = _read_a(options, element, layout, E2M1X2.name)
    if type(b) is not Quantized:
        if weights_only and dtype_of(b_descale) not in _BYTES:
            options = _read_b(options, "", "linear", (E2M1X2 if _packed(a, b) else E2M1).name)
        else:
            _refuse_turned(_MM_FP4, B_SCALE, b, b_descale, block_size, scale_layout, 2)
            options = _read_b(options, element, scale_layout, E2M1X2.name)
    return product(_MM_FP4, a, b, options, a_scale=a_descale, b_scale=b_descale, alpha=alpha, out=out)


def _pdl(name: str, enable_pdl: Any) -> tuple[bool, bool, bool]:
    return flag(name, "enable_pdl", enable_pdl), False, False


def _in_words(read: Any, *given: Any) -> Any:
    """`read(*given)` from its cache, where values can be hashed; those that cannot are refused, without the cache."""
    try:
        return read(*given)
    except TypeError:
        pass
    return read.__wrapped__(*given)


@functools.lru_cache(maxsize=256, typed=True)
def _element(name: str, use_nvfp4: Any, block_size: Any) -> str:
    """The element of the block scales that the flags speak of."""
    use_nvfp4 = flag(name, "use_nvfp4", use_nvfp4)
    block_size = choice(name, "block_size", block_size, (16, 32), "16 for nvfp4 or 32 for mxfp4")
    fmt, block = ("nvfp4", 16) if use_nvfp4 else ("mxfp4", 32)
    if block_size != block:
        other = "use_nvfp4=False for mxfp4" if use_nvfp4 else "use_nvfp4=True for nvfp4"
        raise ValueError(f"{name}: block_size is {block_size}, but {fmt} has blocks of {block}; pass block_size={block}, or {other}.")
    return E4M3.name if use_nvfp4 else E8M0.name


@functools.lru_cache(maxsize=4096)
def _read_a(options: GemmOptions, element: str, layout: str, payload: str | None = None, rows: str = "") -> GemmOptions:
    """`options` that say what the bytes of a and of its scales are."""
    return options._replace(a_element=payload, a_scale_element=element, a_scale_layout=layout, a_scale_rows=rows)


@functools.lru_cache(maxsize=4096)
def _read_b(options: GemmOptions, element: str, layout: str, payload: str | None = None, rows: str = "") -> GemmOptions:
    """`options` that say what the bytes of b and of its scales are."""
    return options._replace(b_element=payload, b_scale_element=element, b_scale_layout=layout, b_scale_rows=rows)


@functools.lru_cache(maxsize=256, typed=True)
def _layouts(name: str, scale_layout: Any, use_8x4: Any) -> tuple[str, str]:
    """How the scales of a and b lie."""
    layout = choice(name, "scale_layout", scale_layout, LAYOUTS, f"one of {', '.join(map(repr, LAYOUTS))}")
    eight = flag(name, "use_8x4_sf_layout", use_8x4)
    if eight and layout == "linear":
        raise ValueError(f"{name}: use_8x4_sf_layout is True, but scale_layout is 'linear'; drop one of them.")
    return "8x4" if eight else layout, layout


def _refuse_shuffled(op: GemmOp, backend: Any) -> None:
    if isinstance(backend, str) and backend == "trtllm":
        raise ValueError(
            f"{op.name}: backend is 'trtllm', which in FlashInfer reads b and its scales with shuffled rows (shuffle_matrix_a); pass "
            "them as they were quantised, and backend='auto'."
        )


def _packed(a: Any, b: Any) -> bool:
    """Whether b holds two codes a byte: then it is half as long as a along k."""
    shape_a, shape_b = shape_of("mm_fp4", "a", a), shape_of("mm_fp4", "b", b)
    return len(shape_b) >= 2 and len(shape_a) >= 1 and 2 * shape_b[-2] == shape_a[-1]


def _refuse_turned(op: GemmOp, position: int, x: Any, scale: Any, block: int, layout: str, per_item: int = 1) -> None:
    """Refuse tiles that `.T` may have copied, which is what it does in JAX: their bytes are then in another order.

    position: of the scale among the roles. x: its operand, a [.., m, k] or b [.., k, n], `per_item` values an element along k.
    """
    if layout not in ("128x4", "8x4") or scale is None or is_scalar(scale):
        return
    role = op.roles[position]
    if framework_of(scale, f"{op.name}: {role}").name != "JAX":
        return
    shape, shape_x = tuple(scale.shape), shape_of(op.name, op.roles[position - A_SCALE], x)
    if len(shape) not in (2, 3) or len(shape_x) not in (2, 3):
        return
    right = position == B_SCALE  # its rows are columns, and FlashInfer passes b_sf.T
    k, rows = (shape_x[-2], shape_x[-1]) if right else (shape_x[-1], shape_x[-2])
    if len(shape) == 2 and len(shape_x) == 3:
        rows *= shape_x[0]
    if dtype_of(x) == "float4_e2m1fn":  # JAX counts its values, not bytes
        per_item = 1
    whole = padded(rows, ceil_div(per_item * k, block), layout)
    square = whole[0] == whole[1]
    if shape[-2:] == whole[::-1] and (right or not square):
        fix = "flat, b_sf.reshape(-1)" if square else f"as the quantiser returned it, {(*shape[:-2], *whole)} or 1-D"
        raise ValueError(
            f"{op.name}: {role} is a JAX array of shape {shape}{', which fits b_sf and b_sf.T' if square else ''}; in JAX .T copies, so "
            f"that tiles lose their order: pass it {fix}."
        )


# --- 16-bit activations, weights prepared -----------------------------------------------------------------------------------------


def prepare_bf16_fp4_weights(
    b: Any, b_descale: Any, alpha: Any = None, *, backend: str = "auto", block_size: int = 16
) -> tuple[Any, Any, Any]:  # fmt: skip
    """(b, b_descale, alpha) as `mm_bf16_fp4` reads them: checked, and the same arrays.

    b: [n, k/2] uint8, two e2m1 codes a byte along k, low nibble = even k. b_descale: e4m3 scales in 128x4 tiles, 1-D or [padded n, padded
    k/16], uint8 or float8_e4m3fn. alpha: float32, one element, or None. This layout, the one `nvfp4_quantize` returns, is frozen; weights
    prepared by FlashInfer are in another, which depends on its backend. backend: FlashInfer's names mean "auto". block_size: 16.

    Raises TypeError (b is not uint8, alpha is not float32) and ValueError (shapes, sizes, block_size, backend), naming the argument.
    Source: FlashInfer `prepare_bf16_fp4_weights`.

    >>> prepared = cugemm.prepare_bf16_fp4_weights(w_fp4, w_sf, alpha)
    """
    op = _PREPARE
    gemm_options(op, None, backend, _W4A16_BACKENDS)
    _check_bf16_fp4(op, alpha, block_size)
    for role, x in (("b", b), ("b_descale", b_descale)):
        if type(x) is Quantized:
            raise op.wrong_type(f"{role} is {x!r}; pass its arrays, q.data and q.scale, or the Quantized itself to mm_bf16_fp4(a, q).")
    shape, _ = shape_of(op.name, "b", b), shape_of(op.name, "b_descale", b_descale)
    if dtype_of(b) != E2M1X2.dtype:
        raise op.wrong_type(f"b is {_shown(b)}; wanted {E2M1X2.dtype}, two e2m1 codes a byte.")
    if len(shape) != 2:
        raise op.error(f"b has shape {shape}; wanted [n, k/2].")
    covered = Covered("b_descale", "b", shape, shape[0], 2 * shape[1], 1, True)
    read_bytes(SPEC.view(spec_of(b_descale, "b_descale"), "b_descale"), covered, E4M3.name, "128x4", "", op.error, op.wrong_type)
    return b, b_descale, alpha


def mm_bf16_fp4(
    a: Any,
    b: Any,
    b_descale: Any = None,
    alpha: Any = None,
    *,
    backend: str = "auto",
    out_dtype: Any = None,
    out: Any = None,
    block_size: int = 16,
    enable_pdl: bool = True,
    skip_check: bool = False,
) -> Any:
    """out[m, n] = alpha * sum over k of a[m, k] * e2m1(b[n, k]) * b_descale[n, k/16].

    a: [m, k] bfloat16 (float16 activations: `mm_fp4`, `linear`). b [n, k/2], b_descale, alpha: what `prepare_bf16_fp4_weights` returned,
    or a Quantized "nvfp4" weight. alpha None is 1.
    out_dtype: default bfloat16. backend: FlashInfer's names mean "auto". block_size: 16. enable_pdl: `pdl` of
    `linear`. skip_check: changes nothing.

    Raises TypeError (a is not bfloat16, b is not uint8, alpha is not float32) and otherwise as `linear`.
    Numerics: e2m1 times e4m3 is exact in bfloat16, sums in fp32. Source: FlashInfer `mm_bf16_fp4`.

    >>> out = cugemm.mm_bf16_fp4(x, *prepared)
    """
    op = _MM_BF16_FP4
    _check_bf16_fp4(op, alpha, block_size)
    options = gemm_options(op, out_dtype, backend, _W4A16_BACKENDS, how=_pdl(op.name, enable_pdl), b_axes="nk")
    options = _read_b(options, E4M3.name, "128x4", E2M1X2.name)
    return product(op, a, b, options, b_scale=b_descale, alpha=alpha, out=out)


def _check_bf16_fp4(op: GemmOp, alpha: Any, block_size: int) -> None:
    choice(op.name, "block_size", block_size, (16,), "16, the blocks of nvfp4: drop it")
    if alpha is not None and not is_scalar(alpha):
        if dtype_of(alpha) != FP32.dtype:
            raise op.wrong_type(f"alpha is {_shown(alpha)}; wanted a number or one float32 element.")
        shape = shape_of(op.name, "alpha", alpha)
        if shape not in ((), (1,)):
            raise op.error(f"alpha has shape {shape}; wanted one element.")


def _shown(x: Any) -> str:
    """What an argument is called in a message."""
    return dtype_of(x) or type(x).__name__
