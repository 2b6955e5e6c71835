# SPDX-License-Identifier: Apache-2.0
"""QTensor: what `quantize` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from pyfmt import _arrays
from pyfmt.formats import LAYOUTS, SCALES, Format, closest


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized tensor: packed codes, block scales, and what they mean.

    value = element(codes) * scales (* tensor_scale)

    codes: uint8, (*lead, bytes of a padded row), the quantized axis moved last, packed
        little-endian.
    scales: (*lead, blocks): uint8 codes for E8M0 and E4M3, else the float scale's dtype; in
        layout "blocked_128x4" a flat (..., tiles * 512).
    tensor_scale: 0-dim float32, or None.
    format, shape (logical), axis (the quantized one, counted from the front), layout (of scales).

    Arrays are all NumPy, all CuPy or all torch. Where a rotation was fused into quantize, the
    values are those of the rotated tensor.
    """

    codes: Any
    scales: Any
    tensor_scale: Any
    format: Format
    shape: tuple[int, ...]
    axis: int
    layout: str = "rows"

    @classmethod
    def of(
        cls,
        codes: Any,
        scales: Any,
        tensor_scale: Any,
        format: Format,
        shape: tuple[int, ...],
        axis: int,
    ) -> QTensor:
        """Return QTensor(...) in a third of its time."""
        made = cls.__new__(cls)
        made.__dict__.update(
            codes=codes,
            scales=scales,
            tensor_scale=tensor_scale,
            format=format,
            shape=shape,
            axis=axis,
        )
        return made

    def dequantize(self, dtype: Any = None, *, backend: str | None = None) -> Any:
        """Return the values in `dtype` (float32 unless given), in the logical shape."""
        from pyfmt.api import dequantize

        return dequantize(self, dtype, backend=backend)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and tensor scale."""
        parts = [self.codes, self.scales]
        if self.tensor_scale is not None:
            parts.append(self.tensor_scale)
        return sum(int(part.nbytes) for part in parts)

    @property
    def size(self) -> int:
        """Number of logical elements."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def to_layout(self, layout: str) -> QTensor:
        """Return the same tensor with its scales in another layout, "rows" or "blocked_128x4".

        Raises ValueError for an unknown layout or scales that are not bytes.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout: unknown {layout!r}{closest(layout, LAYOUTS)}")
        if layout == self.layout:
            return self
        if SCALES[self.format.scale].bits != 8:
            raise ValueError(
                f"layout: blocked_128x4 holds one-byte scales, {self.format.name} has "
                f"{self.format.scale} ones"
            )
        from pyfmt.reference.layout import from_blocked, to_blocked

        if layout == "rows":
            shape = self._row_scales_shape
            rows, columns = (1, *shape)[-2:]
            scales = from_blocked(self.scales, rows, columns).reshape(shape)
        else:
            scales = self.scales if self.scales.ndim > 1 else self.scales.reshape(1, -1)
            scales = to_blocked(scales)
        return replace(self, scales=scales, layout=layout)

    @property
    def _row_scales_shape(self) -> tuple[int, ...]:
        from pyfmt.reference.quantize import Blocks

        lead = self.shape[: self.axis] + self.shape[self.axis + 1 :]
        view = Blocks.of((*lead, self.shape[self.axis]), self.format)
        return view.scales_shape(lead)

    def numpy(self) -> QTensor:
        """Return the same tensor on NumPy arrays."""
        return self._map(_arrays.to_numpy)

    def torch(self, device: Any = None) -> QTensor:
        """Return the same tensor on torch tensors."""
        if _arrays.kind(self.codes) == "torch":
            return self if device is None else self.to(device)
        return self._map(lambda part: _arrays.to_torch(_arrays.to_numpy(part), device))

    def to(self, device: Any) -> QTensor:
        """Return the same tensor on another torch device; TypeError for other arrays."""
        if _arrays.kind(self.codes) != "torch":
            raise TypeError(
                f"to: expected torch tensors, got {_arrays.where(self.codes)}; use .torch(device)"
            )
        return self._map(lambda part: part.to(device))

    def _map(self, move: Any) -> QTensor:
        tensor_scale = None if self.tensor_scale is None else move(self.tensor_scale)
        return replace(
            self, codes=move(self.codes), scales=move(self.scales), tensor_scale=tensor_scale
        )

    def __repr__(self) -> str:
        axis = "" if self.axis == self.ndim - 1 else f", axis={self.axis}"
        layout = "" if self.layout == "rows" else f", layout={self.layout!r}"
        return (
            f"QTensor({self.format.name}, shape={tuple(self.shape)}{axis}{layout}, "
            f"{self.nbytes} bytes, {_arrays.where(self.codes)})"
        )
