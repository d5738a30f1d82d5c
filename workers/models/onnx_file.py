"""ONNX files: their float32 weights and their steps, read without the onnx package.

An ONNX file is one protobuf message. Of its many fields only those are read that tell weights and what they are for; all
others are stepped over by their length. The field numbers are those of ``onnx.proto``:
ModelProto.graph = 7; GraphProto.node = 1, .initializer = 5; NodeProto.input = 1, .output = 2, .op_type = 4;
TensorProto.dims = 1, .data_type = 2, .float_data = 4, .name = 8, .raw_data = 9, .data_location = 14.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from studio_state.errors import ModelError
from workers.models.talk import first_line

Value = int | memoryview

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # how protobuf says where a field ends
_VARINT_BITS = 64
_FLOAT32 = 1  # TensorProto.DataType.FLOAT
_EXTERNAL = 1  # TensorProto.DataLocation.EXTERNAL


class Node(NamedTuple):
    """One step of the graph: an operation, the names of what it reads and the names of what it makes."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class OnnxGraph:
    """What a file holds.

    Attributes:
        tensors: the stored float32 weights by name, read-only; those of other formats are left out.
        nodes: the steps in their order.
    """

    tensors: dict[str, NDArray[np.float32]]
    nodes: tuple[Node, ...]


class _Damage(Exception):
    """What is wrong, in words."""


def read_onnx(file: Path) -> OnnxGraph:
    """Read the weights and the steps of an ONNX file.

    Raises:
        ModelError: it cannot be read, is truncated, damaged or no ONNX file, or keeps its weights in another file.
    """
    try:
        data = memoryview(file.read_bytes())
    except OSError as e:
        raise ModelError(f"{file} cannot be read: {e.strerror or e}") from e
    try:
        graphs = [_message(value) for field, value in _fields(data) if field == 7]
        if len(graphs) != 1:
            raise _Damage(f"it holds {len(graphs)} graphs, expected 1")
        return _graph(graphs[0])
    except (_Damage, ValueError, OverflowError) as e:  # the last two: a name that is no text, a shape that cannot be
        raise ModelError(f"{file} is not an ONNX file, or truncated or damaged ({first_line(e)}); download it again") from e


def _graph(data: memoryview) -> OnnxGraph:
    tensors: dict[str, NDArray[np.float32]] = {}
    nodes: list[Node] = []
    for field, value in _fields(data):
        if field == 1:
            nodes.append(_node(_message(value)))
        elif field == 5:
            name, weights = _tensor(_message(value))
            if weights is not None:
                tensors[name] = weights
    return OnnxGraph(tensors, tuple(nodes))


def _node(data: memoryview) -> Node:
    op, inputs, outputs = "", [], []
    for field, value in _fields(data):
        if field == 1:
            inputs.append(_text(value))
        elif field == 2:
            outputs.append(_text(value))
        elif field == 4:
            op = _text(value)
    return Node(op, tuple(inputs), tuple(outputs))


def _tensor(data: memoryview) -> tuple[str, NDArray[np.float32] | None]:
    """Name and values of one weight; None for a number format other than float32."""
    name, kind, shape = "", 0, []
    raw, single = memoryview(b""), bytearray()
    for field, value in _fields(data):
        if field == 1:
            shape += [value] if isinstance(value, int) else list(_varints(value))
        elif field == 2:
            kind = value if isinstance(value, int) else 0
        elif field == 4:
            single += _message(value)
        elif field == 8:
            name = _text(value)
        elif field == 9:
            raw = _message(value)
        elif field == 14 and value == _EXTERNAL:
            raise _Damage(f"it keeps {name or 'its weights'} in another file")
    if kind != _FLOAT32:
        return name, None
    stored = raw if len(raw) else memoryview(bytes(single))
    if len(stored) != 4 * math.prod(shape):
        raise _Damage(f"{name or 'a weight'} of shape {shape} has {len(stored):,} bytes")
    return name, np.frombuffer(stored, "<f4").reshape(shape)


def _fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    """The fields of a message in their order: number, and a whole number or the bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield field, value
            continue
        if wire == _BYTES:
            length, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise _Damage(f"a field of the unknown kind {wire}")
        if at + length > len(data):
            raise _Damage(f"it ends {at + length - len(data):,} bytes too early")
        yield field, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A whole number of seven bits a byte, the lowest first, and where the next thing begins."""
    number = shift = 0
    while shift < _VARINT_BITS:
        if at >= len(data):
            raise _Damage("it ends within a number")
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
    raise _Damage("a number is too long")


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        number, at = _varint(data, at)
        yield number


def _message(value: Value) -> memoryview:
    if isinstance(value, int):
        raise _Damage("a number stands where a part was expected")
    return value


def _text(value: Value) -> str:
    return str(_message(value), "utf-8")
