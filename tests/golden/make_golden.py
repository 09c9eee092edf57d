"""Make the golden vectors beside this file: `python tests/golden/make_golden.py` with torch 2.13 (CPU) and ml_dtypes 0.6.

Answers come from implementations other than the library's: torch's float8 casts, ml_dtypes' decoders, torch float32 arithmetic for the
quantisation rule, torch float64 products rounded by exact rational arithmetic. The tests read the files and need no torch.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

HERE = Path(__file__).parent
FP8 = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}
BLOCKS = {"tensor": (0, 0), "row": (1, 0), "group": (1, 128), "block": (128, 128)}


def bits(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).numpy()


def casts() -> dict[str, np.ndarray]:
    """Every bf16 and fp16 code (index = code), through float32, to fp8: as torch casts it, and clamped to the largest value first."""
    codes = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    found = {}
    for source, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        x = codes.view(dtype).to(torch.float32)
        for name, (fp8, largest) in FP8.items():
            found[f"{source}_{name}"] = bits(x.to(fp8))
            found[f"{source}_{name}_clamped"] = bits(x.clamp(-largest, largest).to(fp8))
    return found


def decodes() -> dict[str, np.ndarray]:
    """float32 value of every code."""
    codes = np.arange(256, dtype=np.uint8)
    found = {f"torch_{name}": torch.from_numpy(codes).view(fp8).to(torch.float32).numpy() for name, (fp8, _) in FP8.items()}
    found["ml_dtypes_e4m3"] = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    found["ml_dtypes_e5m2"] = codes.view(ml_dtypes.float8_e5m2).astype(np.float32)
    found["ml_dtypes_e2m1"] = codes[:16].view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return found


def inputs() -> dict[str, torch.Tensor]:
    """Values over many binades, with what is special: zeros, subnormals, NaN (both signs), inf, an all-NaN block, the largest values."""
    g = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g) * torch.exp2(torch.randint(-6, 7, shape, generator=g).float())

    wide = draw(7, 259)
    wide[1, :128] = 0
    wide[2, 5], wide[2, 6] = float("nan"), -float("nan")
    wide[3, 130], wide[3, 258] = float("inf"), -float("inf")
    wide[4, 128:256] = float("nan")
    wide[5] *= 1e-42  # float32 subnormals, and scales held up by the floor of 1e-12
    wide[6, :128] = torch.linspace(1, 2, 128) * 2.0**120
    plain = draw(3, 261)  # nothing special, so that one scale for the whole array is a plain number
    # Values that division by their row's scale puts on a tie of e4m3 (odd sixteenths) or e5m2 (odd eighths): times 1 / scale may miss it.
    top = torch.rand((16, 1), generator=g) + 1
    odd = torch.cat([1 + torch.arange(1, 16, 2) / 16, 1 + torch.arange(1, 8, 2) / 8])
    ties = torch.cat([top, top / 448 * torch.cat([odd, 16 * odd, -odd])], dim=1)
    batched = draw(2, 5, 130).to(torch.bfloat16)
    batched[1, 2, 3] = float("nan")
    tall = (draw(133, 131) / 64).to(torch.float16)
    tall[0, 0] = 2.0**-24
    return {"fp32_wide": wide, "fp32_plain": plain, "fp32_ties": ties, "bf16_batched": batched, "fp16_tall": tall}


def quantise(x: torch.Tensor, fp8: torch.dtype, largest: float, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The documented rule, block by block in torch float32."""
    x32 = x.to(torch.float32).reshape(-1, *x.shape[-2:])
    batch, m, k = x32.shape
    gm, gk = block[0] or m, block[1] or k
    floor = torch.tensor(1e-12, dtype=torch.float32)
    whole = block == (0, 0)
    data = torch.empty(x32.shape, dtype=torch.uint8)
    scale = torch.empty((1, 1, 1) if whole else (batch, -(-m // gm), -(-k // gk)), dtype=torch.float32)
    for b in range(batch):
        for i in range(0, m, gm):
            for j in range(0, k, gk):
                part = x32[b, i : i + gm, j : j + gk]
                known = (x32 if whole else part).abs()
                known = known[~known.isnan()]
                amax = known.max() if known.numel() else torch.tensor(0.0)
                s = torch.maximum(amax, floor) / torch.tensor(largest, dtype=torch.float32)
                q = part / s
                codes = q.clamp(-largest, largest).to(fp8).view(torch.uint8)
                data[b, i : i + gm, j : j + gk] = torch.where(q.isnan(), torch.tensor(0x7F, dtype=torch.uint8), codes)
                scale[(0, 0, 0) if whole else (b, i // gm, j // gk)] = s
    return data.reshape(x.shape), scale.reshape((1,) if whole else (*x.shape[:-2], *scale.shape[1:]))


def quantised() -> dict[str, np.ndarray]:
    found = {}
    for case, x in inputs().items():
        found[case] = bits(x)
        for name, (fp8, largest) in FP8.items():
            for kind, block in BLOCKS.items():
                if case == "fp16_tall" and kind in ("row", "group"):
                    continue  # bytes: the tall case is there for ragged 128x128 blocks
                data, scale = quantise(x, fp8, largest, block)
                found[f"{case}/{name}/{kind}/data"], found[f"{case}/{name}/{kind}/scale"] = bits(data), bits(scale)
    return found


def nearest(value: float, mantissa: int, lowest: int) -> float:
    """Round to nearest even at `mantissa` fraction bits and least exponent `lowest`, in rational arithmetic."""
    exact = Fraction(value)
    if exact == 0:
        return 0.0
    e = lowest
    while abs(exact) >= Fraction(2) ** (e + 1):
        e += 1
    step = Fraction(2) ** (e - mantissa)
    return float(round(exact / step) * step)  # Fraction's round is half to even


def products() -> dict[str, np.ndarray]:
    """a [17, 70] @ b [70, 5] by torch in float64, and its roundings as codes of bf16 and fp16."""
    g = torch.Generator().manual_seed(8)
    m, n, k = 17, 5, 70
    found: dict[str, np.ndarray] = {}

    def codes(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    e2m1 = torch.from_numpy(np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64))
    nibbles_a, nibbles_b = (torch.randint(0, 16, shape, generator=g) for shape in ((m, k), (k, n)))
    packed_a = (nibbles_a[:, 0::2] + 16 * nibbles_a[:, 1::2]).to(torch.uint8)
    packed_b = (nibbles_b[0::2] + 16 * nibbles_b[1::2]).to(torch.uint8)
    b16, h16 = codes(torch.bfloat16, m, k), codes(torch.float16, k, n)
    e4, e5 = codes(torch.float8_e4m3fn, m, k), codes(torch.float8_e5m2, k, n)
    sa = torch.exp2(torch.rand((m, 3), generator=g) * 4 - 2)  # blocks (1, 32), the last of 6
    sb = torch.exp2(torch.rand((3, 2), generator=g) * 4 - 2)  # blocks (32, 3), the last of 6 x 2
    left = sa.double().repeat_interleave(32, 1)[:, :k]
    right = sb.double().repeat_interleave(32, 0)[:k].repeat_interleave(3, 1)[:, :n]
    for name, a, b, wide_a, wide_b in (
        ("bf16_fp16", b16, h16, b16.double(), h16.double()),
        ("e4m3_e5m2", e4, e5, e4.double(), e5.double()),
        ("e4m3_e5m2_scaled", e4, e5, e4.double() * left, e5.double() * right),
        ("bf16_e2m1x2", b16, packed_b, b16.double(), e2m1[nibbles_b]),
        ("e2m1x2_e4m3", packed_a, e4[:n].T, e2m1[nibbles_a], e4[:n].T.double()),
    ):
        y = wide_a @ wide_b
        found[f"{name}/a"], found[f"{name}/b"], found[f"{name}/y"] = bits(a), bits(b), y.numpy()
        for dtype, mantissa, lowest, holder in (("bfloat16", 7, -126, torch.bfloat16), ("float16", 10, -14, torch.float16)):
            rounded = torch.tensor([nearest(v, mantissa, lowest) for v in y.flatten().tolist()], dtype=torch.float64).reshape(y.shape)
            assert (rounded.to(holder).double() == rounded).all()
            found[f"{name}/{dtype}"] = bits(rounded.to(holder))
    return {**found, "a_scale": sa.numpy(), "b_scale": sb.numpy()}


if __name__ == "__main__":
    for file, arrays in (("casts", casts()), ("decodes", decodes()), ("quantised", quantised()), ("products", products())):
        np.savez_compressed(HERE / f"{file}.npz", **arrays)
