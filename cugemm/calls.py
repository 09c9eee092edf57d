"""What `python -m cugemm explain` knows: a call of every public operation, as text that can be changed piece by piece.

To add an operation: one line in CALLS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import cugemm
from cugemm import arch, launch
from cugemm.api.quantize import quantize
from cugemm.api.shuffle import shaped, swapped_axes
from cugemm.arrays import HOST, Spec
from cugemm.cases import choose
from cugemm.conversion import QuantizeCall
from cugemm.formats import ALL, BF16, ELEMENTS, FORMATS, FP32
from cugemm.plan import layouts
from cugemm.problem import GemmCall
from cugemm.quantized import Quantized

SIZES = {"m": 16, "n": 4096, "k": 4096, "g": 8, "t": 2}
"""What stands for a size in a shape: rows, output features, inner size, groups or matrices, experts of a row. With the defaults."""

_NVFP4 = "a=nvfp4:mxk:data b=nvfp4:gxnxk:data"
_MXFP4_GROUPS = "a=mxfp8:mxk:data b=mxfp4:gxnxk:data a_scale=uint8:g*127+m/128*128xk/32 b_scale=mxfp4@128x4:gxnxk:scale m_indptr=int32:g+1"
_SVD_PAIR = "a=nvfp4:mxk:data b=nvfp4:nxk:data a_sf=nvfp4@128x4:mxk:scale b_sf=nvfp4@128x4:nxk:scale alpha=1"
CALLS = {
    "QuantizedLinear": "x=bf16:mxk weight=fp8_row:nxk",
    "SegmentGEMMWrapper": "x=bf16:mxk weights=bf16:gxkxn seg_indptr=int32:g+1",
    "batch_deepgemm_fp8_nt_groupwise": "a=fp8_group:gxmxk b=fp8_block:gxnxk a_scale=None b_scale=None masked_m=int32:g expected_m=m",
    "block_scale_interleave": "unswizzled_sf=nvfp4:mxk:scale",
    "bmm_bf16": "A=bf16:gxmxk B=bf16:gxnxk:T",
    "bmm_fp8": "A=e4m3:gxmxk B=e4m3:gxnxk:T A_scale=1 B_scale=1",
    "bmm_mxfp8": "A=mxfp8:gxmxk:data B=mxfp8:gxnxk:data:T A_scale=mxfp8@128x4:g*mxk:scale B_scale=mxfp8@128x4:g*nxk:scale",
    "combine": "y=bf16:mxtxn weights=fp32:mxt",
    "dequantize": "q=fp8_row:mxk",
    "e2m1_and_ufp8sf_scale_to_float": "e2m1_tensor=nvfp4:mxk:data ufp8_scale_tensor=nvfp4@128x4:mxk:scale",
    "fp4_quantize": "input=bf16:mxk global_scale=1",
    "fp8_blockscale_gemm_sm90": "input=bf16:mxk weight=fp8_block:nxk",
    "fp8_gemm_nt": "a=fp8_group:mxk:pair b=fp8_block:nxk:pair d=bf16:mxn",
    "gemm_fp8_nt_blockscaled": "a=fp8_block:mxk b=fp8_block:nxk a_scale=None b_scale=None scale_major_mode=K",
    "gemm_fp8_nt_groupwise": "a=fp8_group:mxk b=fp8_block:nxk a_scale=None b_scale=None scale_major_mode=K",
    "group_deepgemm_fp8_nt_groupwise": "a=fp8_group:mxk b=fp8_block:gxnxk a_scale=None b_scale=None m_indices=int32:m",
    "group_gemm_fp8_nt_groupwise": "a=fp8_group:mxk b=fp8_block:gxnxk a_scale=None b_scale=None m_indptr=int32:g+1",
    "group_gemm_mxfp4_nt_groupwise": _MXFP4_GROUPS,
    "group_gemm_mxfp8_mxfp4_nt_groupwise": _MXFP4_GROUPS,
    "group_gemm_nvfp4_nt_groupwise": f"{_NVFP4} a_scale=uint8:g*127+m/128*128xk/16 b_scale=nvfp4@128x4:gxnxk:scale m_indptr=int32:g+1",
    "grouped_gemm_nt_masked": "lhs=nvfp4@128x4:gxmxk:pair:last rhs=nvfp4@128x4:gxnxk:pair:last out=None masked_m=int32:g "
    "ab_dtype=float4_e2m1fn sf_dtype=float8_e4m3fn c_dtype=bfloat16 sf_vec_size=16",
    "grouped_matmul": "x=bf16:mxk experts=fp8_block:gxnxk indices=int32:mxt",
    "grouped_mm_bf16": "a=bf16:mxk b=bf16:gxnxk m_indptr=int32:g+1",
    "grouped_mm_fp4": f"{_NVFP4} a_descale=nvfp4@128x4:mxk:scale b_descale=nvfp4@128x4:gxnxk:scale m_indptr=int32:g+1",
    "grouped_mm_fp8": "a=e4m3:mxk b=e4m3:gxnxk m_indptr=int32:g+1",
    "grouped_mm_mxfp8": "a=mxfp8:mxk:data b=mxfp8:gxnxk:data a_descale=mxfp8@128x4:mxk:scale "
    "b_descale=mxfp8@128x4:gxnxk:scale m_indptr=int32:g+1",
    "linear": "x=bf16:mxk w=fp8_row:nxk",
    "m_grouped_fp8_gemm_nt_contiguous": "a=fp8_group:mxk:pair b=fp8_block:gxnxk:pair d=bf16:mxn grouped_layout=int32:m",
    "m_grouped_fp8_gemm_nt_masked": "a=fp8_group:gxmxk:pair b=fp8_block:gxnxk:pair d=bf16:gxmxn masked_m=int32:g expected_m=m",
    "make_nvfp4_global_scale": "input_tensor=bf16:mxk per_token_activation=False",
    "matmul": "a=bf16:mxk b=fp8_row:nxk:T",
    "mm_M1_16_K6144_N256": "mat_a=bf16:mx6144 mat_b=bf16:256x6144:T out=fp32:mx256",
    "mm_M1_16_K7168_N128": "mat_a=bf16:mx7168 mat_b=bf16:128x7168:T out=bf16:mx128",
    "mm_M1_16_K7168_N256": "mat_a=bf16:mx7168 mat_b=bf16:256x7168:T out=fp32:mx256",
    "mm_bf16": "a=bf16:mxk b=bf16:nxk:T",
    "mm_bf16_fp4": "a=bf16:mxk b=nvfp4@128x4:nxk",
    "mm_fp4": "a=nvfp4@128x4:mxk b=nvfp4@128x4:nxk:T",
    "mm_fp8": "a=fp8_row:mxk b=fp8_row:nxk:T",
    "mm_mxfp8": "a=mxfp8@128x4:mxk b=mxfp8@128x4:nxk:T",
    "mm_nvfp4_svdquant": f"{_SVD_PAIR} d=bf16:mx32 l1=bf16:nx32",
    "moe_gemm_fp8_nt_groupwise": "a=fp8_group:mxk b=fp8_block:gxnxk a_scale=None b_scale=None m_indptr=int32:g+1 is_gated=True",
    "mxfp4_dequantize": "a_fp4=mxfp4:mxk:data a_sf=mxfp4@128x4:mxk:scale",
    "mxfp4_dequantize_host": "weight=mxfp4:nxk:data scale=mxfp4:nxk:scale",
    "mxfp4_quantize": "a=bf16:mxk",
    "mxfp8_dequantize_host": "input=mxfp8:mxk:data scale_tensor=mxfp8@128x4:mxk:scale",
    "mxfp8_grouped_quantize": "a=bf16:gxmxk mask=int32:g",
    "mxfp8_quantize": "input=bf16:mxk",
    "nvfp4_batched_quantize": "a=bf16:gxmxk a_global_sf=1",
    "nvfp4_block_scale_interleave": "unswizzled_sf=nvfp4:mxk:scale",
    "nvfp4_quantize": "a=bf16:mxk a_global_sf=1",
    "nvfp4_quantize_smooth": "x=bf16:mxk pre_quant_scale=bf16:k global_scale=1",
    "per_token_group_quant_8bit": "x=bf16:mxk group_size=128",
    "prepare_bf16_fp4_weights": "b=nvfp4:nxk:data b_descale=nvfp4@128x4:nxk:scale",
    "prepare_low_latency_gemm_weights": "w=e4m3:nxk",
    "quantize": "x=bf16:mxk format=fp8_row",
    "scaled_fp4_grouped_quantize": "a=bf16:gxmxk mask=int32:g a_global_sf=fp32:g",
    "shuffle_matrix_a": "input_tensor=e4m3:nxk epilogue_tile_m=128",
    "shuffle_matrix_sf_a": "input_tensor=nvfp4:nxk:scale epilogue_tile_m=128",
    "silu_and_mul": "x=bf16:mx2*n",
    "silu_and_mul_nvfp4_quantize": "input=bf16:mx2*n global_scale=1",
    "svdquant_linear": "x=bf16:mxk weight_fp4=nvfp4:nxk:data weight_sf=nvfp4@128x4:nxk:scale alpha=1 pre_quant_scale=bf16:k "
    "l2t_smoothed=bf16:kx32 l1_scaled=bf16:nx32 global_scale=1",
    "tgv_gemm": "a=bf16:mxk b=bf16:nxk:T",
    "tgv_gemm_sm100": "a=bf16:mxk b=bf16:nxk:T",
    "tinygemm_bf16": "input=bf16:mxk weight=bf16:nxk out=bf16:mxn",
}
"""A call of every public operation: what `explain` plans where it is not told otherwise. Arguments as `value` reads them."""

_METHODS: dict[str, Callable[..., Any]] = {
    "QuantizedLinear": lambda x, weight, bias=None, format="fp8_row", activations=None, **more: cugemm.QuantizedLinear(
        weight, bias, format=format, activations=activations
    )(x, **more),
    "SegmentGEMMWrapper": lambda x, weights, **more: cugemm.SegmentGEMMWrapper().run(x, weights, **more),
}
"""How to call what is no function."""


def operand(text: str, device: int = HOST, sizes: Mapping[str, int] = SIZES) -> Any:
    """The Spec, or the Quantized of Specs, that a text stands for: "name:shape", then any of these, in order, each behind a colon.

    T: the transposed view (last two axes). data, scale: that part of a Quantized. pair: (data, scale). flat: in one axis.
    last: the view of [groups, rows, columns], or of the data of such a pair, with the groups last.
    name: a dtype or element ("bfloat16", "bf16"), or a format, whose byte scales may lie in tiles ("fp8_row", "nvfp4@128x4"). shape:
    numbers separated by x, or sums, products and quotients from left to right, with letters as in SIZES. ValueError with an example.
    """
    name, _, rest = text.partition(":")
    shape_text, *words = rest.split(":")
    try:
        shape = tuple(_size(part, sizes) for part in shape_text.split("x"))
        found = _stand_in(name, shape, device)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        why = str(error).removeprefix("Spec: ").removesuffix(".")
        raise ValueError(
            f"operand {text!r}: {why}; write dtype:shape or format:shape, like bfloat16:16x4096 or fp8_row:11008x4096."
        ) from None
    for word in words:
        kinds, change = _WORDS.get(word, ((), None))
        if change is None or type(found) not in kinds:
            raise ValueError(
                f"operand {text!r} has {word!r}; only T (transposed), flat, last, and of a format data, scale, pair can stand there."
            )
        try:
            found = change(found)
        except IndexError:
            raise ValueError(f"operand {text!r} has {word!r}, which needs more axes.") from None
    return found


def _last(x: Any) -> Any:
    return (_last(x[0]), *x[1:]) if isinstance(x, tuple) else swapped_axes(x, (1, 2), (0, 2))


_WORDS: dict[str, tuple[tuple[type, ...], Callable[[Any], Any]]] = {
    "T": ((Spec, Quantized), lambda x: x.T if type(x) is Quantized else swapped_axes(x, (-1, -2))),
    "data": ((Quantized,), lambda q: q.data),
    "scale": ((Quantized,), lambda q: q.scale),
    "pair": ((Quantized,), lambda q: (q.data, q.scale)),
    "flat": ((Spec,), lambda x: shaped(x, (-1,))),
    "last": ((Spec, tuple), _last),
}
"""Of each word: what it goes with, and what it does."""


def _size(text: str, sizes: Mapping[str, int]) -> int:
    first, *more = re.split(r"([*/+])", text)

    def number(part: str) -> int:
        return sizes[part] if part in sizes else int(part)

    found = number(first)
    for sign, part in zip(more[::2], more[1::2], strict=True):
        by = number(part)
        found = found * by if sign == "*" else found // by if sign == "/" else found + by
    return found


def _stand_in(name: str, shape: tuple[int, ...], device: int) -> Spec | Quantized:
    name, at, layout = name.partition("@")
    if at and (name not in FORMATS or not layout):
        raise ValueError(f"{at}{layout} says how the scales of a format lie, as in nvfp4@128x4")
    if name not in FORMATS:
        return Spec(shape, ELEMENTS[name].dtype if name in ELEMENTS else name, device=device)
    with launch.recording():
        return quantize(Spec(shape, BF16.dtype, device=device), name, scale_layout=layout or "linear")


def value(text: str, device: int = HOST, sizes: Mapping[str, int] = SIZES) -> Any:
    """What an argument's text stands for: an operand where it has a colon, else None, a flag, a size, a number, or the text itself."""
    if ":" in text:
        return operand(text, device, sizes)
    constants: dict[str, Any] = {"None": None, "True": True, "False": False, **sizes}
    if text in constants:
        return constants[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def call_text(op: str, a: str | None = None, b: str | None = None, fmt: str | None = None) -> dict[str, str]:
    """The arguments of CALLS for an operation, by name. a, b: instead of its first and second; a name alone keeps their shapes.

    fmt: instead of the argument of that name, else of the format of every operand that has one. ValueError where there is no such thing.
    """
    if op not in CALLS:
        raise ValueError(f"{op!r} is no operation of cugemm; wanted one of {', '.join(CALLS)}.")
    found = dict(part.split("=", 1) for part in CALLS[op].split())
    for at, text in enumerate((a, b)):
        if text is None:
            continue
        if len(found) <= at or ":" not in (old := list(found.values())[at]):
            raise ValueError(f"{op} has no operand {'ab'[at]} to replace; its arguments are {', '.join(found)}.")
        found[list(found)[at]] = text if ":" in text else _renamed(old, text)
    if fmt is not None:
        if "format" in found:
            name, _, layout = fmt.partition("@")
            return found | {"format": name} | ({"scale_layout": layout} if layout else {})
        of_format = {name: text for name, text in found.items() if text.partition(":")[0].partition("@")[0] in FORMATS}
        if not of_format:
            raise ValueError(f"{op} has no format to choose; its arguments are {', '.join(found)}.")
        found |= {name: _renamed(text, fmt) for name, text in of_format.items()}
    return found


def _renamed(text: str, name: str) -> str:
    """An operand's text with another name, and with its layout where the other format has one."""
    old, colon, rest = text.partition(":")
    layout = old.partition("@")[2]
    keeps = layout and "@" not in name and name in FORMATS and FORMATS[name].scale is not FP32
    return f"{name}@{layout}{colon}{rest}" if keeps else f"{name}{colon}{rest}"


def explain(op: str, arguments: Mapping[str, Any], target: arch.Arch | None) -> str:
    """What a call would launch and why: its arguments, and for each launch the problem, the layouts as they were read, kernels, refusals.

    target: plan for this arch; None: for the device of the operands.
    """
    with launch.recording() as calls:
        _METHODS.get(op, getattr(cugemm, op))(**arguments)
    lines = [op, *(f"  {name} = {argument!r}" for name, argument in arguments.items())]
    for recorded in calls:
        lines += [f"cugemm.{recorded.op.name}", *_described(recorded)]
        lines.append(str(recorded.choice if target is None else choose(recorded, target)))
    return "\n".join(lines if calls else [*lines, "no kernel: checks, views and copies in the caller's framework"])


def _described(recorded: launch.Recorded) -> list[str]:
    """A call as it was read."""
    call = recorded.call
    if isinstance(call, GemmCall):
        return layouts(recorded)
    lines = [f"  gives {', '.join(f'{dtype}{list(shape)}' for shape, dtype in call.outputs)}"]
    if isinstance(call, QuantizeCall) and call.scale:
        rows, k = ("all" if n == ALL else n for n in call.problem.block)
        where = (
            "linear" if call.layout == "linear" else f"in {call.layout} tiles" + (", rows of all matrices together" if call.flat else "")
        )
        lines.append(f"  scale: {call.scale}, one for each {rows} x {k} values (rows x k), {where}")
    return lines
