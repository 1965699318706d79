"""An ONNX file as bytes: which of them are the model, and which are texts that it carries. Needs no package but Python.

An ONNX file is one protobuf message: fields one after another, each a key (number << 3 | wire type) and then a varint
(type 0), 8 or 4 bytes (types 1 and 5), or a length and that many bytes (type 2). Protobuf lets a message be extended
by appending fields. So texts can be added to a finished file, and what is not a text can be hashed as it lies there.

Sources: https://protobuf.dev/programming-guides/encoding/ and, for the field numbers,
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from byol_deploy.errors import BundleError
from byol_deploy.images import printable
from byol_deploy.strict_json import is_plain_path

_VARINT, _EIGHT, _BLOCK, _FOUR = 0, 1, 2, 5
_GRAPH, _METADATA = 7, 14  # of ModelProto
_INITIALIZER, _OUTPUT = 5, 12  # of GraphProto
_DATA_TYPE, _FLOAT16 = 2, 10  # of TensorProto, and the value of TensorProto.DataType
_KEY, _VALUE = 1, 2  # of StringStringEntryProto
# Where tensors can be, by the kind of message: field number to the kind of message inside.
_INSIDE: Mapping[str, Mapping[int, str]] = {
    "model": {_GRAPH: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external data"},
}
_DEEPEST = 64
_MAX_TEXTS_BYTES = 128 << 20
_AGAIN = "copy or export it again"


class _Field(NamedTuple):
    """One field: its number and wire type; where it, its content and what follows it begin."""

    number: int
    wire: int
    start: int
    content: int
    stop: int


class _Malformed(Exception):
    """The bytes are no protobuf message, or one that ONNX never writes."""


def texts(path: Path) -> dict[str, str]:
    """The texts that a file carries (``metadata_props``), by key.

    Raises:
        BundleError: It is not an ONNX file, damaged, or carries a key twice or more than 128 MiB.
    """
    with _opened(path) as data:
        found: dict[str, str] = {}
        size = 0
        for field in _top(data):
            if not _is_text(field):
                continue
            size += field.stop - field.start
            if size > _MAX_TEXTS_BYTES:
                raise _Malformed(f"it carries more than {_MAX_TEXTS_BYTES} bytes of text")
            key, value = _entry(data, field)
            if key in found:
                raise _Malformed(f"it carries {key[:80]!r} twice")
            found[key] = value
        return found


def content_hash(path: Path) -> str:
    """``sha256:`` and 64 digits over everything but the texts, external data files included.

    Raises:
        BundleError: It is not an ONNX file, damaged, or its external data is missing or outside its folder.
    """
    with _opened(path) as data:
        digest = hashlib.sha256()
        names: set[str] = set()
        for field in _top(data):
            if not _is_text(field):
                digest.update(memoryview(data)[field.start : field.stop])
        for field in _fields(data, 0, len(data)):
            kind = _INSIDE["model"].get(field.number)
            if kind is not None and field.wire == _BLOCK:
                names |= set(_external(data, field, kind, 1))
    for name in sorted(names):
        # A protobuf field never begins with a zero byte, so this cannot be mistaken for more of the model.
        digest.update(b"\0" + name.encode() + b"\0" + _external_digest(path, name))
    return f"sha256:{digest.hexdigest()}"


class Output(NamedTuple):
    """An output as a file declares it: its type by the number in TensorProto.DataType; sizes, None where open."""

    name: str
    type: int
    shape: tuple[int | None, ...]


def outputs(path: Path) -> tuple[Output, ...]:
    """What a graph gives, in order.

    Raises:
        BundleError: It is not an ONNX file, or damaged.
    """
    with _opened(path) as data:
        graph = next(field for field in _top(data) if field.number == _GRAPH)
        return tuple(_output(data, field) for field in _inside(data, graph, _OUTPUT))


def holds_float16(path: Path) -> bool:
    """Whether any weight of a graph is float16.

    Raises:
        BundleError: It is not an ONNX file, or damaged.
    """
    with _opened(path) as data:
        graph = next(field for field in _top(data) if field.number == _GRAPH)
        tensors = _inside(data, graph, _INITIALIZER)
        return any(_FLOAT16 in _numbers(data, tensor, _DATA_TYPE) for tensor in tensors)


def with_outputs(path: Path, names: Sequence[str]) -> bytes | None:
    """The model with only some of its outputs, so that a runtime drops what computes the others.

    ONNX Runtime computes every output of a graph, whichever are asked for.

    Returns:
        An ONNX model without its texts; None where there is nothing to leave out, or where tensors lie in a second
        file, which cannot be found from bytes.

    Raises:
        BundleError: It is not an ONNX file, or damaged.
    """
    with _opened(path) as data:
        fields = list(_top(data))
        graph = next(field for field in fields if field.number == _GRAPH)
        given = _inside(data, graph, _OUTPUT)
        idle = {field.start for field in given if _output(data, field).name not in names}
        if not idle or len(idle) == len(given) or any(True for _ in _external(data, graph, "graph", 1)):
            return None
        parts = _fields(data, graph.content, graph.stop)
        kept = b"".join(data[field.start : field.stop] for field in parts if field.start not in idle)
        rest = b"".join(
            data[field.start : field.stop] for field in fields if field.number != _GRAPH and not _is_text(field)
        )
        return rest + _block(_GRAPH, kept)


def _inside(data: mmap.mmap, field: _Field, number: int) -> list[_Field]:
    """The messages of one number in a message."""
    parts = _fields(data, field.content, field.stop)
    return [part for part in parts if part.number == number and part.wire == _BLOCK]


def _output(data: mmap.mmap, field: _Field) -> Output:
    """A ValueInfoProto: name 1, type 2; in the type tensor_type 1 with elem_type 1 and shape 2; dim 1, dim_value 1."""
    name = next((data[part.content : part.stop] for part in _inside(data, field, 1)), b"").decode("utf-8", "replace")
    kind = 0
    shape: tuple[int | None, ...] = ()
    for tensor in [part for declared in _inside(data, field, 2) for part in _inside(data, declared, 1)]:
        kind = next((value for value in _numbers(data, tensor, 1)), 0)
        sizes = [size for part in _inside(data, tensor, 2) for size in _inside(data, part, 1)]
        shape = tuple(next(iter(_numbers(data, size, 1)), None) for size in sizes)
    return Output(name, kind, shape)


def _numbers(data: mmap.mmap, field: _Field, number: int) -> list[int]:
    parts = _fields(data, field.content, field.stop)
    return [_varint(data, part.content, part.stop)[0] for part in parts
            if part.number == number and part.wire == _VARINT]  # fmt: skip


def append_texts(path: Path, added: Mapping[str, str]) -> None:
    """Add texts at the end of a file; every byte before them stays.

    Raises:
        ValueError: One of the keys is there already.
        BundleError: It is not an ONNX file, or damaged.
    """
    twice = sorted(set(texts(path)) & set(added))
    if twice:
        raise ValueError(f"{path.name} carries {', '.join(twice)} already")
    with open(path, "ab") as file:
        for key, value in added.items():
            entry = _block(_KEY, key.encode()) + _block(_VALUE, value.encode())
            file.write(_block(_METADATA, entry))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[mmap.mmap]:
    """The file's bytes, mapped: pages come and go, so 2 GB of weights cost no memory."""
    shown = printable(path)
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except FileNotFoundError:
        raise BundleError(f"{shown} does not exist; pass a bundle or an .onnx file of byol-deploy export") from None
    except _Malformed as error:
        raise BundleError(f"{shown} is not an ONNX file, or is damaged: {error}; {_AGAIN}") from None
    except UnicodeDecodeError as error:
        raise BundleError(f"{shown} is damaged: a text in it is not UTF-8 ({error.reason}); {_AGAIN}") from None
    except ValueError as error:  # mmap's word for an empty file
        raise BundleError(f"{shown} is empty; {_AGAIN}") from error
    except OSError as error:
        raise BundleError(f"{shown} cannot be read: {error.strerror or error}") from error


def _top(data: mmap.mmap) -> Iterator[_Field]:
    graph = False
    for field in _fields(data, 0, len(data)):
        graph = graph or (field.number == _GRAPH and field.wire == _BLOCK)
        yield field
    if not graph:
        raise _Malformed("it holds no graph")


def _is_text(field: _Field) -> bool:
    return field.number == _METADATA and field.wire == _BLOCK


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[_Field]:
    at = start
    while at < stop:
        key, content = _varint(data, at, stop)
        number, wire = key >> 3, key & 7
        if wire == _BLOCK:
            length, content = _varint(data, content, stop)
            end = content + length
        elif wire == _VARINT:
            end = _varint(data, content, stop)[1]
        elif wire in (_EIGHT, _FOUR):
            end = content + (8 if wire == _EIGHT else 4)
        else:
            raise _Malformed(f"byte {at} begins no field")
        if number == 0:
            raise _Malformed(f"byte {at} begins no field")
        if end > stop:
            raise _Malformed(f"a field at byte {at} reaches past the end: it was cut off or changed")
        yield _Field(number, wire, at, content, end)
        at = end


def _varint(data: mmap.mmap, at: int, stop: int) -> tuple[int, int]:
    """A number of seven bits a byte, least first, and where the next byte lies."""
    value = 0
    for place in range(10):  # 64 bits need no more
        if at + place >= stop:
            raise _Malformed(f"it ends within a number at byte {at}")
        byte = data[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise _Malformed(f"a number at byte {at} is longer than any can be")


def _entry(data: mmap.mmap, field: _Field) -> tuple[str, str]:
    """Key and value of a StringStringEntryProto. Nothing else may be in it: it would be neither text nor content."""
    found: dict[int, str] = {}
    for part in _fields(data, field.content, field.stop):
        if part.number not in (_KEY, _VALUE) or part.wire != _BLOCK or part.number in found:
            raise _Malformed(f"an entry at byte {field.start} is no pair of key and value")
        found[part.number] = data[part.content : part.stop].decode("utf-8")
    return found.get(_KEY, ""), found.get(_VALUE, "")


def _external(data: mmap.mmap, field: _Field, kind: str, depth: int) -> Iterator[str]:
    """The names of external data files in a message of ``kind``, which is the content of ``field``."""
    if depth > _DEEPEST:
        raise _Malformed(f"its graphs are nested more than {_DEEPEST} deep")
    if kind == "external data":
        key, value = _entry(data, field)
        if key == "location":
            yield value
        return
    inside = _INSIDE[kind]
    for part in _fields(data, field.content, field.stop):
        deeper = inside.get(part.number)
        if deeper is not None and part.wire == _BLOCK:
            yield from _external(data, part, deeper, depth + 1)


def _external_digest(path: Path, name: str) -> bytes:
    shown, beside = printable(path), path.parent / name
    if not is_plain_path(name) or not beside.resolve().is_relative_to(path.parent.resolve()):
        raise BundleError(f"{shown} names the file {name!r}, which leaves its folder; do not use this file")
    try:
        with open(beside, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except FileNotFoundError:
        raise BundleError(
            f"{shown} keeps its weights in {printable(name)}, which is missing beside it; copy that file into the "
            "same folder"
        ) from None
    except OSError as error:
        raise BundleError(f"{printable(beside)} cannot be read: {error.strerror}") from error


def _block(number: int, content: bytes) -> bytes:
    return _number(number << 3 | _BLOCK) + _number(len(content)) + content


def _number(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
