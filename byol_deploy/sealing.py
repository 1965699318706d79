"""The seal of a lone file: an entry that says what the file is, and by which any changed byte shows.

A written file carries texts: the manifest, the golden cases, and, added last, the entry ``byol_deploy.artefact`` of
:class:`CarriedArtefact`. It holds a hash over everything in the file but the texts, a hash of each of the other texts,
and one of itself; and the manifest promises it, so that it cannot get lost. So every byte is covered once. It is a seal
against accidents and stale files, not a signature: whoever can write the file can seal it anew.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from byol_deploy.errors import BundleError
from byol_deploy.strict_json import is_plain_path, short

CARRIED_MANIFEST_KEY = "byol_deploy.manifest"
CARRIED_GOLDEN_KEY = "byol_deploy.golden"
CARRIED_ARTEFACT_KEY = "byol_deploy.artefact"
PROMISE = "sealed"
"""Key of the carried manifest: this file carries a seal."""

_OURS = "byol_deploy."
_MAX_BYTES = 1 << 20
_MAX_ITEMS = 64
_MAX_TEXT = 500
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_AGAIN = "copy or export it again"


@dataclass(frozen=True)
class CarriedArtefact:
    """What one written file says about itself.

    Attributes:
        format: e.g. "onnx", "torchscript".
        precision: "fp32", "fp16", "bf16", "int8".
        content: ``sha256:`` and 64 digits: the format's hash of everything but the texts.
        extra_files: Names of the files that must lie beside it.
        host: Where and how it was compared at export, see :func:`byol_deploy.host.describe_host`.
        texts: Hashes of the other texts of byol-deploy in the file, by key.
    """

    format: str
    precision: str
    content: str
    extra_files: tuple[str, ...] = ()
    host: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """JSON text that :meth:`from_json` reads: one spelling only, with its own hash in the key ``sha256``."""
        document = {
            "format": self.format,
            "precision": self.precision,
            "content": self.content,
            "extra_files": list(self.extra_files),
            "host": dict(self.host),
            "texts": dict(self.texts),
        }
        return _spelled(document | {"sha256": _own_hash(document)})

    @classmethod
    def from_json(cls, text: str, name: str = "the file") -> CarriedArtefact:
        """Parse JSON text from a stranger. Keys that are not known are ignored.

        Raises:
            BundleError: Not what :meth:`to_json` wrote: too large, changed since, or with faults, which are all listed.
        """
        broken = f"the seal of {name} is damaged"
        if len(text) > _MAX_BYTES:
            raise BundleError(f"{broken}: it has more than {_MAX_BYTES} bytes; {_AGAIN}")
        try:
            data = json.loads(text)
            if not isinstance(data, dict):
                raise ValueError(f"it is a JSON {type(data).__name__}, not an object")
            same = text == _spelled(data)
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise BundleError(f"{broken}: {reason}; {_AGAIN}") from None
        noted = data.pop("sha256", None)
        if not same or noted != _own_hash(data):
            raise BundleError(f"{broken}: it does not have the hash that it notes of itself; {_AGAIN}")
        faults = _faults(data)
        if faults:
            raise BundleError(f"the seal of {name} has {len(faults)} fault(s): {'; '.join(faults[:20])}; {_AGAIN}")
        return cls(
            data["format"], data["precision"], data["content"], tuple(data["extra_files"]), data["host"], data["texts"]
        )


class Sealable(Protocol):
    """The part of an export format that sealing needs, see :class:`byol_deploy.formats.Format`."""

    name: str

    def carried(self, path: Path) -> dict[str, str]:
        """The texts that a file carries."""

    def content_hash(self, path: Path) -> str:
        """A hash over everything but the texts."""

    def seal(self, path: Path, texts: Mapping[str, str]) -> None:
        """Add texts and change nothing else."""


def seal_artefact(
    path: Path, format: Sealable, precision: str, host: Mapping[str, str], extra_files: tuple[str, ...] = ()
) -> CarriedArtefact:
    """Seal a written file: the last thing that is done to it.

    Args:
        path: The file, with the texts of ``carry(..., sealed=True)`` in it.
        format: Its format.
        precision: "fp32", "fp16", "bf16", "int8".
        host: Where and how it was compared.
        extra_files: Names of the files that belong to it.

    Returns:
        What was added to the file.

    Raises:
        BundleError: The file is damaged, or an extra file is missing.
        ValueError: It is sealed already, or a value is none that a reader would take.
    """
    texts = {key: _hash(text) for key, text in format.carried(path).items() if key.startswith(_OURS)}
    if CARRIED_ARTEFACT_KEY in texts:
        raise ValueError(f"{path.name} is sealed already")
    made = CarriedArtefact(
        format.name, precision, format.content_hash(path), tuple(sorted(extra_files)), dict(host), texts
    )
    text = made.to_json()
    try:
        CarriedArtefact.from_json(text)
    except BundleError as error:
        raise ValueError(f"{path.name} cannot be sealed: {error}") from error
    format.seal(path, {CARRIED_ARTEFACT_KEY: text})
    return made


def read_artefact(texts: Mapping[str, str], name: str = "the file") -> CarriedArtefact | None:
    """Read the seal, and check the other texts of byol-deploy against it.

    Args:
        texts: What the file carries.
        name: How messages call the file.

    Returns:
        The seal; None for a file of an older version, which has none.

    Raises:
        BundleError: It is damaged, lost, or a text that it covers has changed.
    """
    if CARRIED_ARTEFACT_KEY not in texts:
        if _promised(texts.get(CARRIED_MANIFEST_KEY, "")):
            raise BundleError(f"{name} was sealed and its seal is gone: it has been changed; {_AGAIN}")
        return None
    artefact = CarriedArtefact.from_json(texts[CARRIED_ARTEFACT_KEY], name)
    found = {key: _hash(text) for key, text in texts.items() if key.startswith(_OURS) and key != CARRIED_ARTEFACT_KEY}
    if found != dict(artefact.texts):
        keys = sorted(key for key in {*found, *artefact.texts} if found.get(key) != artefact.texts.get(key))
        raise BundleError(f"{name} was changed: {', '.join(keys)} in it is not what was sealed; {_AGAIN}")
    return artefact


def _promised(manifest: str) -> bool:
    try:
        data = json.loads(manifest)
    except (ValueError, RecursionError):  # its own reader says so
        return False
    return isinstance(data, dict) and bool(data.get(PROMISE, False))


def _faults(data: Mapping[str, Any]) -> list[str]:
    def is_text(value: object) -> bool:
        return isinstance(value, str) and len(value) <= _MAX_TEXT and value.isprintable()

    def is_names(value: object) -> bool:
        return isinstance(value, list) and len(value) <= _MAX_ITEMS and all(is_text(item) for item in value)

    def is_texts(value: object) -> bool:
        return isinstance(value, dict) and len(value) <= _MAX_ITEMS and all(
            is_text(key) and is_text(item) for key, item in value.items()
        )  # fmt: skip

    def is_hash(value: object) -> bool:
        return isinstance(value, str) and bool(_HASH.fullmatch(value))

    def is_name(value: object) -> bool:
        return isinstance(value, str) and bool(_NAME.fullmatch(value))

    checks = {
        "format": (is_name, "a name such as onnx"),
        "precision": (is_name, "a name such as fp32"),
        "content": (is_hash, "sha256: and 64 hexadecimal digits"),
        "extra_files": (
            lambda value: is_names(value) and all(is_plain_path(item) for item in value),
            "a list of names of files beside this one",
        ),
        "host": (is_texts, f"at most {_MAX_ITEMS} short texts by key"),
        "texts": (lambda value: is_texts(value) and all(map(is_hash, value.values())), "hashes by key"),
    }
    return [
        f"{key} is {short(data[key])}; it must be {expected}" if key in data else f"{key} is missing"
        for key, (holds, expected) in checks.items()
        if not holds(data.get(key))
    ]


def _spelled(document: Mapping[str, Any]) -> str:
    """One spelling for one document, so that a changed byte between the values shows too."""
    return json.dumps(document, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)


def _own_hash(document: Mapping[str, Any]) -> str:
    return _hash(_spelled(document))


def _hash(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
