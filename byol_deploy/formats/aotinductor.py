"""AOTInductor (``.aoti``): the encoder as native code, for servers that have PyTorch but not the model's Python code.

Compiled by a C++ compiler at export, weights inside; loaded with PyTorch of the version that exported, or a newer one::

    model = torch._inductor.aoti_load_package(open("model.aoti", "rb"))
    embedding = model(images)["embedding"]  # images (N, H, W, 3) uint8, any N

In C++ ``torch::inductor::AOTIModelPackageLoader`` loads it and gives the outputs in their order. The code is for one
operating system and one kind of processor. On x86-64 that is any with AVX2, not only the one that exports; a processor
that lacks what a file needs is refused by name. Loading one runs what is in it: open no file whose seal does not hold,
and none of a stranger. The texts are extra files of the archive, so there is one file.
"""

from __future__ import annotations

import io
import json
import platform
import re
import shlex
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.errors import BundleError, ExportError, MissingError, ProviderError
from byol_deploy.formats import Opened, RunOptions, Signature, _torchscript_file
from byol_deploy.formats._torch_archive import ArchiveFormat
from byol_deploy.formats._torch_program import exported, first_line, quiet, threads
from byol_deploy.images import printable

_LOGGERS = ("torch._inductor", "torch.export", "torch._dynamo", "torch.utils.cpp_extension")
_X86 = ("x86_64", "amd64")
# What is behind Inductor's names, in those of ``torch.cpu.get_capabilities``; the first is all of x86-64-v3.
_INSTRUCTIONS = {
    "avx2": ("avx2", "bmi", "bmi2", "f16c", "fma3", "lzcnt"),
    "avx512": ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"),
}
_THREADS = 8  # what loops are cut for; any number runs them
_MODEL = "data/aotinductor/model/"
_FACTS = "_metadata.json"


class _AotInductor(ArchiveFormat):
    name = "aotinductor"
    kind = "an AOTInductor file"
    suffix = ".aoti"

    def export(self, graph: Any, signature: Signature, path: Path, carried: Mapping[str, str]) -> tuple[Path, ...]:
        """See :meth:`byol_deploy.formats.Format.export`.

        Raises:
            MissingError: There is no C++ compiler.
        """
        import torch

        _check_compiler()
        program = exported(graph, signature, named=True)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # would go into the comments of the sources
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "model.pt2"
            try:
                with (
                    quiet(*_LOGGERS),
                    threads(_THREADS),  # loops are cut for so many as there are now
                    torch.no_grad(),
                    torch.random.fork_rng(devices=[]),
                ):
                    torch._inductor.aoti_compile_and_package(
                        program, package_path=str(made), inductor_configs=_settings()
                    )
            except Exception as error:
                # Whatever a compiler raises on a stranger's graph is that graph's trouble, not a bug here.
                raise ExportError(f"AOTInductor of PyTorch {torch.__version__} failed: {_reason(error)}") from error
            _torchscript_file.write(_packed(made, carried), path)
        return ()

    def load(self, path: Path, options: RunOptions) -> Opened:
        """See :meth:`byol_deploy.formats.Format.load`. This runs native code that lies in the file.

        ``options.threads`` holds while the file runs; PyTorch has one number for the whole process.
        """
        self.check_provider(options)
        facts = self._facts(path)
        import torch

        _check_processor(path, facts)
        try:
            with quiet(*_LOGGERS), open(path, "rb") as file:  # by name it would have to end in .pt2
                model = torch._inductor.aoti_load_package(file)
            outputs = [str(name) for name in json.loads(json.loads(model.loader.get_call_spec()[1])[1]["context"])]
        except Exception as error:
            # A package of a newer PyTorch ends in any kind of error.
            raise BundleError(
                f"{printable(path)} cannot be opened by PyTorch {torch.__version__}: {first_line(error)}; export it "
                "again, or use the version of PyTorch that wrote it"
            ) from error

        def compute(images: np.ndarray, wanted: Sequence[str] | None) -> dict[str, np.ndarray]:
            with threads(options.threads), torch.inference_mode():
                values = model(torch.from_numpy(np.require(images, requirements=["C", "W"])))
            return {name: values[name].numpy() for name in (outputs if wanted is None else wanted)}

        return Opened(compute, provider="cpu", session=model)

    def _facts(self, path: Path) -> dict[str, str]:
        """For which system and processor a file was compiled; nothing in it is run."""
        self.carried(path)
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if _MODEL in name and name.endswith(_FACTS)]
                facts = json.loads(archive.read(names[0])) if names else None
            if not isinstance(facts, dict):
                raise ValueError("it holds no compiled model")
        except (ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
            raise BundleError(
                f"{printable(path)} is not {self.kind}, or is damaged: {error}; export it again"
            ) from error
        return {str(key): str(value) for key, value in facts.items()}


def _settings() -> dict[str, Any]:
    """Inductor's. It takes no compiler flags but ``march``; what stands behind it there is a flag of its own."""
    import torch
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    # Names of headers and sources, which stay in the binary, begin where everyone's do.
    places = (str(Path(torch.__file__).parents[1]), cache_dir())
    flags = " ".join(shlex.quote(f"-ffile-prefix-map={place}=.") for place in places)
    settings: dict[str, Any] = {
        "freezing": True,  # batch norm goes into the convolutions
        "cpp.weight_prepack": False,  # packed weights would suit this processor alone
        "cpp.dynamic_threads": True,  # else the number of threads is compiled in
        "compile_threads": 1,  # in this process: no pool of workers is left behind
    }
    if platform.machine().lower() in _X86:
        settings |= {"cpp.simdlen": 256, "cpp.march": f"x86-64-v3 {flags}"}
    elif sys.platform != "darwin":
        settings["cpp.march"] = f"native {flags}"
    return settings


def _packed(made: Path, carried: Mapping[str, str]) -> io.BytesIO:
    """Inductor's package without its sources and a number that each export draws anew, and with the texts."""
    packed = io.BytesIO()
    with zipfile.ZipFile(made) as source, zipfile.ZipFile(packed, "w") as target:
        for name in source.namelist():
            inside = name.partition("/")[2]
            if not inside.endswith((".cpp", "serialization_id")):
                target.writestr(f"archive/{inside}", source.read(name))
        for key, text in carried.items():
            target.writestr(f"archive/extra/{key}", text)
    packed.seek(0)
    return packed


def _check_compiler() -> None:
    from torch._inductor import config

    named = config.cpp.cxx if isinstance(config.cpp.cxx, tuple) else (config.cpp.cxx,)
    if not any(shutil.which(name) for name in (*named, "g++", "clang++") if name):
        raise MissingError(
            "AOTInductor needs a C++ compiler, and there is none here; install one (Debian, Ubuntu: apt install g++), "
            "or name yours in the environment variable CXX"
        )


def _check_processor(path: Path, facts: Mapping[str, str]) -> None:
    import torch

    wanted = (facts.get("AOTI_PLATFORM", sys.platform), facts.get("AOTI_MACHINE", platform.machine()))
    here = (sys.platform, platform.machine())
    if wanted != here:
        raise ProviderError(
            f"{printable(path)} was compiled for {' '.join(wanted)}, and this is {' '.join(here)}; export it on a "
            "machine of this kind"
        )
    there = {name for name, has in torch.cpu.get_capabilities().items() if has is True}
    words = facts.get("AOTI_CPU_ISA", "").lower().split() if platform.machine().lower() in _X86 else []
    missing = sorted({name for word in words for name in _INSTRUCTIONS.get(word, (word,))} - there)
    if missing:
        raise ProviderError(
            f"{printable(path)} was compiled for a processor with {' and '.join(missing)}, which this one lacks; "
            "export it on a machine like this one"
        )


def _reason(error: Exception) -> str:
    """The compiler's own error line where it is one, else the first line."""
    found = re.search(r"^.*\berror: .*$", str(error), re.MULTILINE)
    return f"the C++ compiler says {found.group()[:300]}" if found else first_line(error)


FORMAT = _AotInductor()
