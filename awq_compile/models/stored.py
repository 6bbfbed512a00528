"""Arrays of the compiled model's parameters, one parameter in memory at a time: what a DIST stores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from awq_compile.errors import ArtifactError
from awq_compile.formats import QuantizedMatrix, QuantSpec
from awq_compile.models.parameters import Parameter


class WeightSource(Protocol):
    """Where parameters come from, by Hugging Face tensor name: a `QuantizedModel`."""

    def matrix(self, name: str) -> QuantizedMatrix | npt.NDArray[Any]:
        """A linear's or the embedding's weight, packed, or float16 (N, K)."""
        ...

    def vector(self, name: str) -> npt.NDArray[Any]:
        """A norm weight or a bias."""
        ...


def stored_arrays(
    parameters: Iterable[Parameter], source: WeightSource
) -> Iterator[tuple[str, tuple[int, ...], str, list[npt.NDArray[Any]]]]:
    """(name, shape, dtype, pieces that follow each other) of every array, in parameter order."""
    for parameter in parameters:
        pieces: dict[str, list[npt.NDArray[Any]]] = {}
        for tensor in parameter.sources:
            if parameter.spec is None:
                found: dict[str, npt.NDArray[Any]] = {"": source.vector(tensor)}
            else:
                matrix = source.matrix(tensor)
                found = matrix.arrays() if isinstance(matrix, QuantizedMatrix) else {"weight": matrix}
            for suffix, array in found.items():
                pieces.setdefault(suffix, []).append(array)
        expected = parameter.arrays()
        if len(pieces) != len(expected):
            raise ArtifactError(f"{parameter.name}: arrays {list(pieces)} do not fit {list(expected)}")
        if isinstance(parameter.spec, QuantSpec) and parameter.spec.order == "KN":  # rows of W are columns here
            pieces = {suffix: [np.concatenate(parts, axis=1)] for suffix, parts in pieces.items()}
        for (name, (shape, dtype)), parts in zip(expected.items(), pieces.values(), strict=True):
            stacked = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            if stacked != shape or any(part.dtype != dtype for part in parts):
                raise ArtifactError(f"{name}: found {stacked} {parts[0].dtype}, expected {shape} {dtype}")
            yield name, shape, dtype, parts
