"""Whether a ``torch.export`` file is data and nothing else.

``torch.export.load`` is not made for files of strangers. It unpickles (example inputs, tensors marked so, objects), it
loads native code that lies in the same archive, it evaluates the sizes in the file as Python (``sympify``), and it
compiles Python source into which names, guards and operators of the file go as they are. So the archive is read here
first, and handed on only where each entry, each string and each operator is of a kind that cannot do anything.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

_FIXED = {"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id"}
_PROGRAM = "models/model.json"
_EXAMPLE = "data/sample_inputs/model.pt"
_WEIGHTS = "data/weights/model_weights_config.json"
_CONSTANTS = "data/constants/model_constants_config.json"
_TENSOR = re.compile(r"data/(?:weights/weight|constants/tensor)_\d+", re.ASCII)
_TEXTS = "extra/"

# Neither a bracket nor a quote, blank or equals sign: nothing of this can end a name or call something.
_WORD = re.compile(r"[\w.+-]*", re.ASCII)
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file\.|save\.)\w+\.\w+"  # these two take the name of a file
    r"|torch\.ops\.higher_order\.wrap_with_(?:set_grad_enabled|autocast)"
    r"|torch\.sym_\w+"
    r"|math\.(?:ceil|floor|trunc)"
    r"|_operator\.(?:add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)",
    re.ASCII,
)
# How sizes are written: Mul(Integer(4), Symbol('s34', positive=True, integer=True)).
_CALL = re.compile(
    r"Symbol|Integer|Rational|Float|Add|Mul|Max|Min|And|Or|Not|Where|ToFloat|(?:Python|)Mod|ModularIndexing"
    r"|(?:Floor|Clean|Ceil|IntTrue|FloatTrue)Div|(?:Ceil|Floor|Trunc)ToInt"
    r"|Equality|Unequality|(?:Strict|)(?:Less|Greater)Than"
)
_NAMES = frozenset({"true", "false", "int_oo", "oo"})
# The rest of the schema: objects, and operators as values.
_ARGUMENT = re.compile(
    r"as_(?:(?:optional_|)tensor|int|int_list|float|bool|string|sym_int|sym_float|sym_bool)s?"
    r"|as_(?:none|complex|scalar_type|memory_format|layout|device|name|expr|graph)"
)
_NOTES = frozenset({"nn_module_stack", "stack_trace", "torch_fn"})
_CONTAINERS = frozenset({"builtins.tuple", "builtins.list", "builtins.dict"})


def read(path: Path) -> io.BytesIO:
    """A file as an archive in memory that holds what was checked and nothing else.

    Raises:
        ValueError: It holds something that could run code, or is not such a file; one sentence.
        zipfile.BadZipFile: It is no archive.
        OSError: It cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        listed = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in listed):
            raise ValueError("its entries are compressed, which PyTorch never does")
        root = listed[0].filename.partition("/")[0] + "/" if listed else ""
        if len({entry.filename for entry in listed}) != len(listed) or not all(
            entry.filename.startswith(root) for entry in listed
        ):
            raise ValueError("two of its entries have one name, or they lie in several folders")
        entries = {entry.filename[len(root) :]: archive.read(entry) for entry in listed}
    _check(entries)
    # Written anew: PyTorch's own reader of archives shall not find other entries than Python's did.
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            if not name.startswith(_TEXTS):
                archive.writestr(f"archive/{name}", content)
    packed.seek(0)
    return packed


def _check(entries: dict[str, bytes]) -> None:
    missing = {_PROGRAM, _EXAMPLE, _WEIGHTS, _CONSTANTS, "archive_version"} - set(entries)
    if missing:
        raise ValueError(f"it has no {min(missing)}")
    for name in entries:
        if name not in _FIXED | {_PROGRAM, _EXAMPLE, _WEIGHTS, _CONSTANTS} and not (
            name.startswith(_TEXTS) or _TENSOR.fullmatch(name)
        ):
            raise ValueError(f"it holds {name[:80]!r}, which is neither the program nor a tensor and could run code")
    if entries[_EXAMPLE]:
        _check_pickle(entries[_EXAMPLE])
    for name in (_WEIGHTS, _CONSTANTS):
        document = _parsed(entries, name)
        for key, tensor in document["config"].items():
            if tensor.get("use_pickle") is not False or not _TENSOR.fullmatch(
                f"{name.rpartition('/')[0]}/{tensor.get('path_name')}"
            ):
                raise ValueError(f"its tensor {key[:80]!r} is pickled, which could run code")
        _walk(document, "")
    _walk(_parsed(entries, _PROGRAM), "")


def _parsed(entries: dict[str, bytes], name: str) -> Any:
    document = json.loads(entries[name])
    if not isinstance(document, dict) or (name != _PROGRAM and not isinstance(document.get("config"), dict)):
        raise ValueError(f"its {name} is not what torch.export writes")
    return document


def _check_pickle(content: bytes) -> None:
    """Example inputs of another writer; ours have none. ``torch.export.load`` tries the same reader first."""
    import torch

    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # whatever a stranger's pickle raises
        raise ValueError("its example inputs are a pickle of more than tensors, which could run code") from error


def _walk(value: Any, key: str) -> None:
    """Check a JSON value that stands under ``key``."""
    if key == "guards_code" and value:
        raise ValueError("it holds guards, which are Python code")
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "metadata" and isinstance(inner, dict) and set(inner) <= _NOTES:
                continue  # where a node comes from; read as text only
            if name.startswith("as_") and not _ARGUMENT.fullmatch(name):
                raise ValueError(f"it holds an argument of the kind {name[:80]!r}, which could run code")
            _check_text(name, "")
            _walk(inner, name)
    elif isinstance(value, list):
        for inner in value:
            _walk(inner, key)
    elif isinstance(value, str):
        _check_text(value, key)


def _check_text(text: str, key: str) -> None:
    if key in ("as_string", "as_strings"):
        return  # goes into the source as a quoted constant
    if key == "target":
        if not _OPERATOR.fullmatch(text):
            raise ValueError(f"it calls {text[:80]!r}, which is no operator of PyTorch that only computes")
    elif key == "expr_str":
        if not _is_size(text):
            raise ValueError(f"it holds the size {text[:80]!r}, which is no arithmetic")
    elif key in ("in_spec", "out_spec"):
        if not (isinstance(spec := json.loads(text), list) and len(spec) == 2 and _is_container(spec[1])):
            raise ValueError("it takes or gives something other than tensors in tuples, lists and dicts")
    elif not _WORD.fullmatch(text):
        raise ValueError(f"it holds the name {text[:80]!r}, which could be code")


def _is_size(text: str) -> bool:
    def plain(node: ast.expr) -> bool:
        if isinstance(node, ast.Call):
            return (
                isinstance(node.func, ast.Name)
                and _CALL.fullmatch(node.func.id) is not None
                and all(map(plain, node.args))
                and all(isinstance(keyword.value, ast.Constant) and keyword.arg for keyword in node.keywords)
            )
        if isinstance(node, ast.Constant):
            return isinstance(node.value, int) or (
                isinstance(node.value, str) and re.fullmatch(r"\w+", node.value, re.ASCII) is not None
            )
        if isinstance(node, ast.UnaryOp):
            return plain(node.operand)
        return isinstance(node, ast.Name) and node.id in _NAMES

    try:
        return len(text) < 4096 and plain(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_container(spec: Any) -> bool:
    """Whether a tree of ``torch.utils._pytree`` has plain containers only; others name a module to import."""
    if not isinstance(spec, dict) or not isinstance(spec.get("children_spec"), list):
        return False
    if spec.get("type") is None:
        return spec.get("context") is None and not spec["children_spec"]
    keys = json.loads(spec["context"]) if isinstance(spec.get("context"), str) else spec.get("context")
    plain = keys is None or (isinstance(keys, list) and all(isinstance(key, str) for key in keys))
    return spec["type"] in _CONTAINERS and plain and all(map(_is_container, spec["children_spec"]))
