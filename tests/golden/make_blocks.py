"""Make blocks.npz beside this file: `python tests/golden/make_blocks.py` with torch 2.13 (CPU) and ml_dtypes 0.6.

Block-scaled and integer formats, written down from their definitions without the library: torch float32 arithmetic for the rules, exact
powers of two from `frexp`, torch's float8 casts, ml_dtypes' float4 cast and decoders. Arrays are stored as bits (`bits` of make_golden).
NVFP4 stands there twice: with a given encoding scale g (the exact mode of FlashInfer's quantiser), and as TransformerEngine's reference
quantiser goes about it, from the amax of the tensor or of each row.
"""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from make_golden import bits

HERE = Path(__file__).parent
FLT_MAX = torch.finfo(torch.float32).max
INTEGERS = {  # name -> (values of k under one scale, 0 for all of them, -1 for the whole array; largest code)
    "int8_tensor": (-1, 127),
    "int8_row": (0, 127),
    "int8_group": (128, 127),
    "int4_row": (0, 7),
    "int4_g32": (32, 7),
    "int4_g64": (64, 7),
    "int4_g128": (128, 7),
}
UNSIGNED = {"uint4_g32": 32, "uint4_g64": 64, "uint4_g128": 128}
FINITE = ("bf16_plain", "fp16_plain", "fp32_tiny")


def inputs() -> dict[str, torch.Tensor]:
    """Values over many binades, and what is special: zeros of both signs, subnormals, NaN, inf, ties, scales at both ends."""
    g = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g) * torch.exp2(torch.randint(-6, 7, shape, generator=g).float())

    wide = draw(9, 150)
    wide[0, 3:6] = -0.0
    wide[1, :32] = 0
    wide[2, 5], wide[2, 40] = float("nan"), -float("nan")
    wide[3, 20], wide[3, 149] = float("inf"), -float("inf")
    wide[4, 64:96] = float("nan")
    wide[5] *= 1e-42
    wide[6] = torch.linspace(1, 2, 150) * 2.0**120
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])  # halfway between two codes of e2m1
    near = torch.cat([ties, -ties, torch.nextafter(ties, torch.tensor(9.0)), torch.nextafter(ties, torch.tensor(0.0))])
    wide[7] = torch.cat([torch.tensor([6.0]), near, torch.tensor([6.0])]).repeat(5) * 2.0 ** torch.arange(-70, 80).float()
    for first, exponent in ((0, 0), (32, -9), (64, 100), (96, -100)):
        wide[7, first : first + 30] = torch.cat([torch.tensor([6.0, -6.0]), near]) * 2.0**exponent
        wide[7, first + 30 : first + 32] = 0
    wide[8] = draw(150) * 2.0 ** torch.arange(-140, -65, 0.5).floor().float()  # mx scales around their smallest code
    plain = draw(36, 64).to(torch.bfloat16)
    half = (draw(5, 96) * 4).to(torch.float16)
    half[0, 0], half[1, 1], half[2, 95] = 2.0**-24, 65504.0, -0.0
    batched = draw(2, 3, 48).to(torch.bfloat16)
    batched[1, 2, 3] = float("nan")
    tiny = draw(3, 48) * torch.tensor([[1e-36], [1e-39], [1e-44]])
    return {
        "fp32_wide": wide,
        "bf16_plain": plain,
        "fp16_plain": half,
        "bf16_batched": batched,
        "fp32_tiny": tiny,
        "fp32_zeros": torch.zeros(2, 32),
    }


# --- elements ---------------------------------------------------------------------------------------------------------------------


def blocks_of(x: torch.Tensor, size: int) -> torch.Tensor:
    """[.., k] -> [.., ceil(k / size), size] float32, the last block filled up with zeros."""
    x = x.to(torch.float32)
    k = x.shape[-1]
    size = size or max(k, 1)
    return torch.nn.functional.pad(x, (0, -k % size)).unflatten(-1, (-1, size))


def packed(codes: torch.Tensor, k: int) -> np.ndarray:
    """[.., blocks, size] codes of 4 bits -> [.., k / 2] bytes, low nibble = even k."""
    codes = codes.flatten(-2)[..., :k]
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8).numpy()


def e2m1(values: torch.Tensor) -> torch.Tensor:
    """Codes of float32 values to nearest even, saturating; ml_dtypes casts, the midpoints are counted beside it."""
    clipped = values.clamp(-6, 6)
    codes = torch.from_numpy(clipped.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8).astype(np.int64))
    above = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]  # a midpoint goes to its even neighbour: to the upper one for every second
    counted = sum((clipped.abs() >= t if i % 2 else clipped.abs() > t).long() for i, t in enumerate(above))
    assert (counted + 8 * torch.signbit(clipped) == codes).all()
    return codes


def e4m3(values: torch.Tensor, largest: float = 448.0, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return values.clamp(-largest, largest).to(dtype).view(torch.uint8)


def power_above(value: float) -> int:
    """e8m0 code of the least power of two that is not below `value`."""
    if value == 0:
        return 0
    fraction, exponent = math.frexp(value)  # value = fraction * 2^exponent, fraction in [0.5, 1)
    return min(max((exponent - 1 if fraction == 0.5 else exponent) + 127, 0), 254)


# --- block formats ----------------------------------------------------------------------------------------------------------------


def nvfp4(x: torch.Tensor, g: float) -> dict[str, np.ndarray]:
    """scale = e4m3(vecmax * (g * (1/6))), data = e2m1(x * min(1 / (scale * (1/g)), FLT_MAX)) in float32; a NaN or inf spoils its block."""
    parts = blocks_of(x, 16)
    g32, one = torch.tensor(g, dtype=torch.float32), torch.tensor(1.0)
    vecmax = parts.abs().amax(-1, keepdim=True)
    scale = e4m3(vecmax * (g32 * (one / 6)))
    decoded = scale.view(torch.float8_e4m3fn).to(torch.float32)
    factor = (one / (decoded * (one / g32))).clamp(max=FLT_MAX)
    factor = torch.where(vecmax == 0, 0, factor)
    bad = ~parts.isfinite().all(-1, keepdim=True)
    codes = torch.where(bad, 0, e2m1(torch.where(bad, 0, parts * factor)))
    return {"data": packed(codes, x.shape[-1]), "scale": torch.where(bad, 0x7F, scale)[..., 0].to(torch.uint8).numpy()}


def nvfp4_te(x: torch.Tensor, per_row: bool) -> dict[str, np.ndarray]:
    """TransformerEngine's way: encode = 448 * 6 / amax, decode of a block, encode of a block, cast. Finite values only."""
    x32 = x.to(torch.float32)
    amax = x32.abs().amax(-1) if per_row else x32.abs().max()
    global_encode = torch.div(torch.tensor(448.0) * torch.tensor(6.0), amax)
    global_encode = torch.minimum(global_encode, torch.tensor(FLT_MAX))
    global_decode = torch.div(1.0, global_encode)
    spread = (lambda t: t[..., None, None]) if per_row else (lambda t: t)
    parts = blocks_of(x, 16)
    decode = parts.abs().amax(-1, keepdim=True) * spread(global_encode * torch.reciprocal(torch.tensor(6.0)))
    decode = torch.minimum(decode, torch.tensor(FLT_MAX)).clamp(-448, 448).to(torch.float8_e4m3fn)
    encode = torch.div(1.0, decode.to(torch.float32) * spread(global_decode))
    encode = torch.minimum(encode, torch.tensor(FLT_MAX))
    codes = e2m1((parts * encode).clamp(-6, 6))
    return {
        "data": packed(codes, x.shape[-1]),
        "scale": decode.view(torch.uint8)[..., 0].numpy(),
        "tensor_scale": bits(global_decode.reshape(*amax.shape, 1) if per_row else global_decode.reshape(1)),
        "global_scale": bits(global_encode.reshape(*amax.shape, 1) if per_row else global_encode.reshape(1)),
    }


def mxfp4(x: torch.Tensor) -> dict[str, np.ndarray]:
    """scale = least power of two >= vecmax / 6, data = e2m1(x / scale); code 0 stores zeros, a block with a NaN or inf is NaN."""
    parts = blocks_of(x, 32)
    bad = ~parts.isfinite().all(-1)
    over6 = torch.where(bad, 0, parts.abs().amax(-1) / 6)
    scale = over6.double().apply_(power_above).long()
    exact = parts.double() * torch.exp2(127 - scale.double())[..., None]
    exact = torch.where(scale[..., None] == 0, exact * 0, exact)
    codes = torch.where(bad[..., None], 0, e2m1(torch.where(bad[..., None], 0, exact).float()))
    return {"data": packed(codes, x.shape[-1]), "scale": torch.where(bad, 255, scale).to(torch.uint8).numpy()}


def mxfp8(x: torch.Tensor, dtype: torch.dtype, largest: float) -> dict[str, np.ndarray]:
    """scale = least power of two >= vecmax / largest, data = e4m3(x / scale); code 0 stores zeros.

    NaN stays NaN and does not count; an inf makes its block's scale NaN and its data 0.
    """
    parts = blocks_of(x, 32)
    nan, spoilt = parts.isnan(), parts.isinf().any(-1)
    known = torch.where(nan | spoilt[..., None], 0, parts)
    scale = (known.abs().amax(-1) / torch.tensor(largest)).double().apply_(power_above).long()
    exact = known.double() * torch.exp2(127 - scale.double())[..., None]
    exact = torch.where(scale[..., None] == 0, exact * 0, exact)
    codes = e4m3(exact.float(), largest, dtype)
    codes = torch.where(nan, 0x7F, codes.long())
    codes = torch.where(spoilt[..., None], 0, codes).flatten(-2)[..., : x.shape[-1]]
    return {"data": codes.to(torch.uint8).numpy(), "scale": torch.where(spoilt, 255, scale).to(torch.uint8).numpy()}


def integers(x: torch.Tensor, block: int, largest: int) -> dict[str, np.ndarray]:
    """scale = max(amax, 1e-12) / largest, data = round(x / scale); a NaN or inf makes the block's scale NaN."""
    parts = x.to(torch.float32).reshape(1, 1, -1) if block < 0 else blocks_of(x, block)
    bad = ~parts.isfinite().all(-1, keepdim=True)
    scale = torch.maximum(parts.abs().amax(-1, keepdim=True), torch.tensor(1e-12)) / torch.tensor(float(largest))
    codes = torch.where(bad, 0, torch.round(parts / scale).clamp(-largest, largest)).to(torch.int8)
    scale = torch.where(bad, float("nan"), scale)[..., 0]
    if largest == 7:
        return {"data": packed(codes.long() & 15, x.shape[-1]), "scale": bits(scale)}
    codes = codes.reshape(x.shape) if block < 0 else codes.flatten(-2)[..., : x.shape[-1]]
    return {"data": bits(codes), "scale": bits(scale.reshape(1) if block < 0 else scale)}


def unsigned(x: torch.Tensor, block: int) -> dict[str, np.ndarray]:
    """scale = max(max(0, x) - min(0, x), 1e-12) / 15, zero = round(-min / scale), data = round(x / scale) + zero, all in 0..15."""
    parts = blocks_of(x, block)
    bad = ~parts.isfinite().all(-1, keepdim=True)
    least, most = parts.amin(-1, keepdim=True).clamp(max=0), parts.amax(-1, keepdim=True).clamp(min=0)
    scale = torch.maximum(most - least, torch.tensor(1e-12)) / torch.tensor(15.0)
    zero = torch.where(bad, 0, torch.round(-least / scale).clamp(0, 15))
    codes = torch.where(bad, 0, (torch.round(parts / scale) + zero).clamp(0, 15)).long()
    scale = torch.where(bad, float("nan"), scale)
    return {"data": packed(codes, x.shape[-1]), "scale": bits(scale[..., 0]), "zero": zero[..., 0].to(torch.uint8).numpy()}


def quantised() -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}

    def add(name: str, arrays: dict[str, np.ndarray]) -> None:
        found.update({f"{name}/{role}": array for role, array in arrays.items()})

    for case, x in inputs().items():
        found[case] = bits(x)
        known = x.float()[x.float().isfinite()].abs()
        computed = min(2688 / float(known.max()), FLT_MAX) if float(known.max()) else 3.0
        for i, g in enumerate((1.0, computed, 0.0137, 1e30)):
            add(f"{case}/nvfp4/{i}", {**nvfp4(x, g), "global_scale": np.float32([g]).view(np.int32)})
        add(f"{case}/mxfp4", mxfp4(x))
        add(f"{case}/mxfp8", mxfp8(x, torch.float8_e4m3fn, 448.0))
        add(f"{case}/mxfp8_e5m2", mxfp8(x, torch.float8_e5m2, 57344.0))
        for name, (block, largest) in INTEGERS.items():
            if block >= 0 or case in FINITE:
                add(f"{case}/{name}", integers(x, block, largest))
        for name, block in UNSIGNED.items():
            add(f"{case}/{name}", unsigned(x, block))
        if case in FINITE:
            add(f"{case}/nvfp4_te", nvfp4_te(x, per_row=False))
            add(f"{case}/nvfp4_row_te", nvfp4_te(x, per_row=True))
    return found


# --- layouts and decoders ---------------------------------------------------------------------------------------------------------


def tiled(scale: torch.Tensor, rows: int) -> np.ndarray:
    """[r, c] bytes in tiles of `rows` x 4; 128 rows lie as 32 x 4 with the 32 outside."""
    r, c = scale.shape
    full = torch.nn.functional.pad(scale, (0, -c % 4, 0, -r % rows))
    high, wide = full.shape
    if rows == 8:
        return full.view(high // 8, 8, wide // 4, 4).permute(0, 2, 1, 3).reshape(high, wide).numpy()
    return full.view(high // 128, 4, 32, wide // 4, 4).permute(0, 3, 2, 1, 4).reshape(high, wide).numpy()


def layouts() -> dict[str, np.ndarray]:
    g = torch.Generator().manual_seed(12)
    found = {}
    for shape in ((1, 1), (5, 6), (32, 4), (129, 3), (200, 9), (256, 8)):
        scale = torch.randint(1, 256, shape, generator=g).to(torch.uint8)
        found[f"layout/{shape[0]}x{shape[1]}"] = scale.numpy()
        found[f"layout/{shape[0]}x{shape[1]}/128x4"], found[f"layout/{shape[0]}x{shape[1]}/8x4"] = tiled(scale, 128), tiled(scale, 8)
    return found


def tables() -> dict[str, np.ndarray]:
    """float32 value of every code."""
    codes = np.arange(256, dtype=np.uint8)
    return {
        "table/e8m0": torch.from_numpy(codes).view(torch.float8_e8m0fnu).float().numpy(),
        "table/e8m0_ml_dtypes": codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32),
        "table/e4m3": torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy(),
        "table/e2m1": codes[:16].view(ml_dtypes.float4_e2m1fn).astype(np.float32),
        "table/int4": codes[:16].astype(ml_dtypes.uint4).view(ml_dtypes.int4).astype(np.float32),
        "table/uint4": codes[:16].astype(ml_dtypes.uint4).astype(np.float32),
    }


def dequantised() -> dict[str, np.ndarray]:
    """((stored - zero) * scale) * tensor_scale in float32, rounded once by torch: 8 x 96 random codes of every block format."""
    g = torch.Generator().manual_seed(13)
    decode = {name: torch.from_numpy(values) for name, values in tables().items()}
    m, k = 8, 96
    found: dict[str, np.ndarray] = {}
    for name, table, block, scales in (
        ("nvfp4", "e2m1", 16, "e4m3"),
        ("mxfp4", "e2m1", 32, "e8m0"),
        ("mxfp8", "e4m3", 32, "e8m0"),
        ("int4_g32", "int4", 32, ""),
        ("uint4_g32", "uint4", 32, ""),
    ):
        codes = torch.randint(0, 256 if table == "e4m3" else 16, (m, k), generator=g)
        real = decode[f"table/{table}"][codes]
        found[f"dequantised/{name}/data"] = codes.to(torch.uint8).numpy() if table == "e4m3" else packed(codes[..., None, :], k)
        if name == "uint4_g32":
            zero = torch.randint(0, 16, (m, k // block), generator=g)
            found[f"dequantised/{name}/zero"] = zero.to(torch.uint8).numpy()
            real = real - zero.float().repeat_interleave(block, 1)
        if scales:
            scale_codes = torch.randint(0, 128 if scales == "e4m3" else 256, (m, k // block), generator=g)
            scale_codes[0, 0], scale_codes[1, 1], scale_codes[2, 2] = 0, 127, 254 if scales == "e8m0" else 126
            scale = decode[f"table/{scales}"][scale_codes]
            found[f"dequantised/{name}/scale"] = scale_codes.to(torch.uint8).numpy()
        else:
            scale = torch.randn((m, k // block), generator=g).abs()
            found[f"dequantised/{name}/scale"] = bits(scale)
        real = real * scale.repeat_interleave(block, 1)
        if name == "nvfp4":
            tensor_scale = torch.rand((1,), generator=g)
            found[f"dequantised/{name}/tensor_scale"] = bits(tensor_scale)
            real = real * tensor_scale
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found[f"dequantised/{name}/{str(dtype).removeprefix('torch.')}"] = bits(real.to(dtype))
    return found


if __name__ == "__main__":
    np.savez_compressed(HERE / "blocks.npz", **quantised(), **layouts(), **tables(), **dequantised())
