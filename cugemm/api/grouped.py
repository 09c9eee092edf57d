"""Products whose rows choose their weights: experts of a mixture, adapters of a batch."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from cugemm.api.common import flag, gemm_options, product, shape_of, shown
from cugemm.arrays import is_scalar
from cugemm.problem import FLOATS8, FLOATS16
from cugemm.problem import product as register

_ELEMENTS = (*FLOATS16, *FLOATS8)
_ROLES = {"a": "x", "b": "weights", "experts": "weight_indices"}
_BY_INDEX = register("SegmentGEMMWrapper.forward", _ELEMENTS, _ELEMENTS, called={**_ROLES, "segments": "expert_indices"})
_BY_INDPTR = register("SegmentGEMMWrapper.run", _ELEMENTS, _ELEMENTS, called={**_ROLES, "segments": "seg_indptr"})
_BY_LENS = register("SegmentGEMMWrapper.run(seg_lens)", _ELEMENTS, _ELEMENTS, called={**_ROLES, "segments": "seg_lens"})


class SegmentGEMMWrapper:
    """y[i] = x[i] @ weights[expert of row i]: segments of rows, or single rows in any order, each with a matrix of its own.

    Two ways to build one. `SegmentGEMMWrapper(num_experts=, hidden_size=, intermediate_size=, device=)` fixes the shape of the weights,
    which every call is checked against. FlashInfer's `SegmentGEMMWrapper(float_workspace_buffer, backend=)` fixes nothing; the workspace
    is not used, because the kernels need none. It holds no other state, and one object serves any number of threads.

    Source: FlashInfer `SegmentGEMMWrapper`.

    >>> wrapper = cugemm.SegmentGEMMWrapper(num_experts=8, hidden_size=4096, intermediate_size=11008)
    >>> y = wrapper.forward(x, expert_weights, expert_indices)
    """

    def __init__(
        self,
        float_workspace_buffer: Any = None,
        backend: str = "auto",
        *,
        num_experts: int | None = None,
        hidden_size: int | None = None,
        intermediate_size: int | None = None,
        device: Any = None,
    ) -> None:
        sizes = (num_experts, hidden_size, intermediate_size)
        if None in sizes and sizes != (None, None, None):
            raise TypeError("SegmentGEMMWrapper: pass num_experts, hidden_size and intermediate_size together, or none of them.")
        if any(n is not None and (not isinstance(n, Integral) or isinstance(n, bool) or n < 0) for n in sizes):
            raise ValueError(
                f"SegmentGEMMWrapper: num_experts, hidden_size, intermediate_size are {shown(sizes)}; wanted ints, none of them negative."
            )
        gemm_options(_BY_INDPTR, None, backend, ("sm80", "sm90"))
        self._shape = sizes if None not in sizes else None
        self._backend = backend
        self.device = device

    def reset_workspace_buffer(self, float_workspace_buffer: Any, int_workspace_buffer: Any = None) -> None:
        """Accepted for FlashInfer's sake; there is no workspace to replace."""

    def run(
        self,
        x: Any,
        weights: Any,
        batch_size: Any = None,
        weight_column_major: bool = False,
        out: Any = None,
        seg_lens: Any = None,
        seg_indptr: Any = None,
        weight_indices: Any = None,
        *,
        out_dtype: Any = None,
    ) -> Any:
        """y[i] = x[i] @ weights[e(i)].

        x: [m, d_in], float16, bfloat16, float8_e4m3fn or float8_e5m2. weights: [experts, d_in, d_out], or [experts, d_out, d_in] with
        weight_column_major=True. Arrays of integers are int32 or int64 and live where x lives.
        Third argument: an int is FlashInfer's batch_size, the number of segments, with seg_lens [batch_size] or seg_indptr [batch_size +
        1] saying which rows they hold and weight_indices [batch_size] which matrix each takes (default: its own number); an array [m]
        gives the matrix of every row, in any order (`expert_indices`).
        Rows in no segment, or with a matrix that does not exist, are zero; so are rows of segments that reach past m or begin before an
        earlier one's end. Device values are not read back: nothing synchronises. out: [m, d_out]; out_dtype: default x's dtype if 16-bit,
        else bfloat16.

        Raises ValueError and TypeError, naming the argument. Numerics: as `cugemm.linear`.
        """
        weight_column_major = flag("SegmentGEMMWrapper.run", "weight_column_major", weight_column_major)
        if self._shape is not None:
            experts, hidden, intermediate = self._shape
            wanted = (experts, intermediate, hidden) if weight_column_major else (experts, hidden, intermediate)
            shape = shape_of("SegmentGEMMWrapper.run", "weights", weights)
            if shape != wanted:
                raise ValueError(f"SegmentGEMMWrapper.run: weights have shape {shape}, but the wrapper was built for {wanted}.")
        counted = batch_size is None or is_scalar(batch_size)
        if batch_size is not None and counted and (not isinstance(batch_size, Integral) or isinstance(batch_size, bool)):
            raise TypeError(f"SegmentGEMMWrapper.run: batch_size is {shown(batch_size)}; pass an int, or an array of expert indices.")
        rows = {"expert_indices": None if counted else batch_size, "seg_indptr": seg_indptr, "seg_lens": seg_lens}
        given = [name for name, value in rows.items() if value is not None]
        if len(given) != 1:
            names = " and ".join(given) if given else "nothing"
            raise ValueError(
                f"SegmentGEMMWrapper.run: {names} says which rows go where; pass one of expert_indices, seg_lens and seg_indptr."
            )
        kind, op = {"expert_indices": ("indices", _BY_INDEX), "seg_indptr": ("indptr", _BY_INDPTR), "seg_lens": ("lens", _BY_LENS)}[
            given[0]
        ]
        segments = rows[given[0]]
        count = shape_of("SegmentGEMMWrapper.run", given[0], segments)
        if kind == "indices" and weight_indices is not None:
            raise ValueError("SegmentGEMMWrapper.run: weight_indices go with segments; expert_indices name the matrices already.")
        if kind != "indices" and batch_size is not None and count[:1] != (batch_size + (kind == "indptr"),):
            raise ValueError(f"SegmentGEMMWrapper.run: batch_size is {batch_size}, but {given[0]} has shape {count}.")
        if kind == "indices" and len(count) != 1:
            raise ValueError(
                f"SegmentGEMMWrapper.run: expert_indices has shape {count}; wanted [m], one matrix for each row: for several pass "
                "cugemm.grouped_matmul(x, experts, indices=...)."
            )
        options = gemm_options(
            op, out_dtype, self._backend, ("sm80", "sm90"), b_axes="nk" if weight_column_major else "kn", segments=kind
        )  # fmt: skip
        return product(op, x, weights, options, segments=segments, experts=weight_indices, out=out)

    forward = run
