"""AOTInductor files: native code for one kind of machine, and what is refused before any of it runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from byol_deploy import formats
from byol_deploy.errors import BundleError, MissingError, ProviderError
from byol_deploy.formats import RunOptions, Signature

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler")

SIZE = 16
SIGNATURE = Signature(SIZE, ("embedding", "other"))
FACTS = "wrapper_metadata.json"


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 8, 3)
        self.norm = torch.nn.BatchNorm2d(8)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = self.norm(self.convolution(images.permute(0, 3, 1, 2).float() / 255)).relu().mean((2, 3))
        return values, values * 2


@pytest.fixture(scope="module")
def model() -> Small:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def path(model: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("aotinductor") / "model.aoti"
    formats.get("aotinductor").export(model, SIGNATURE, found, {"note": "ünïcode"})
    return found


def images(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)


def expected(model: Small, pixels: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(pixels))[0])


def with_facts(path: Path, target: Path, **facts: str) -> Path:
    """The same file that says it was compiled for another machine."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith(FACTS):
                content = json.dumps(json.loads(content) | facts).encode()
            archive.writestr(name, content)
    return target


def test_outputs_can_be_chosen(path: Path, model: Small) -> None:
    found = formats.get("aotinductor").load(path, RunOptions()).compute(images(5), ["other"])
    assert list(found) == ["other"]
    assert np.allclose(found["other"], 2 * expected(model, images(5)), rtol=1e-5, atol=1e-6)


def test_pytorch_alone_opens_it(path: Path, model: Small) -> None:
    code = (
        "import sys, torch; sys.modules['byol_deploy'] = None;"
        "model = torch._inductor.aoti_load_package(open(sys.argv[1], 'rb'));"
        "out = model(torch.full((5, 16, 16, 3), 7, dtype=torch.uint8));"
        "print(*out, *out['embedding'][4].tolist())"
    )
    got = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    first, second, *values = got.split()
    assert (first, second) == ("embedding", "other")
    wanted = expected(model, np.full((1, SIZE, SIZE, 3), 7, np.uint8))[0]
    assert np.allclose(np.array(values, dtype=np.float32), wanted, rtol=1e-5, atol=1e-6)


def test_equal_graphs_give_equal_bytes_whatever_the_threads_and_no_source_is_left(
    path: Path, model: Small, tmp_path: Path
) -> None:
    """Inductor cuts loops for the number of threads that PyTorch has at export."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        formats.get("aotinductor").export(model, SIGNATURE, tmp_path / "again.aoti", {"note": "ünïcode"})
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "again.aoti").read_bytes() == path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    assert any(name.endswith(".so") for name in names)
    assert not any(name.endswith((".cpp", ".h")) for name in names)


def test_callers_in_several_threads_get_their_own_values(path: Path, model: Small) -> None:
    session = formats.get("aotinductor").load(path, RunOptions())
    batches = [images(n) for n in (1, 3, 8, 11, 2, 5)] * 3
    with ThreadPoolExecutor(4) as pool:
        for pixels, found in zip(batches, pool.map(session, batches), strict=True):
            assert np.allclose(found["embedding"], expected(model, pixels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"AOTI_MACHINE": "sparc"}, "compiled for .* sparc, and this is"),
        ({"AOTI_PLATFORM": "plan9"}, "compiled for plan9 .*, and this is"),
        pytest.param(
            {"AOTI_CPU_ISA": "AVX2 AVX1024"},
            "processor with avx1024, which this one lacks",
            marks=pytest.mark.skipif("x86_64" not in torch.cpu.get_capabilities().values(), reason="for x86-64"),
        ),
    ],
)
def test_code_for_another_machine_is_refused_unrun(
    facts: dict[str, str], said: str, path: Path, tmp_path: Path
) -> None:
    with pytest.raises(ProviderError, match=said):
        formats.get("aotinductor").load(with_facts(path, tmp_path / "other.aoti", **facts), RunOptions())


def test_the_same_file_written_anew_is_opened(path: Path, model: Small, tmp_path: Path) -> None:
    opened = formats.get("aotinductor").load(with_facts(path, tmp_path / "same.aoti"), RunOptions())
    assert np.allclose(opened(images(2))["embedding"], expected(model, images(2)), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif("x86_64" not in torch.cpu.get_capabilities().values(), reason="for x86-64")
def test_on_x86_it_asks_for_avx2_and_no_more(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(FACTS)]
        assert json.loads(archive.read(name))["AOTI_CPU_ISA"] == "AVX2"


def test_an_archive_without_compiled_code_is_refused(model: Small, tmp_path: Path) -> None:
    formats.get("pt2").export(model, SIGNATURE, tmp_path / "model.pt2", {})
    with pytest.raises(BundleError, match=r"is not an AOTInductor file, .*no compiled model"):
        formats.get("aotinductor").load((tmp_path / "model.pt2").rename(tmp_path / "model.aoti"), RunOptions())


def test_without_a_compiler_the_error_says_what_to_install(
    model: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match="apt install g\\+\\+"):
        formats.get("aotinductor").export(model, SIGNATURE, tmp_path / "x.aoti", {})


def test_another_provider_is_refused(path: Path) -> None:
    with pytest.raises(ProviderError, match="cpu here, not on 'cuda'"):
        formats.get("aotinductor").load(path, RunOptions("cuda"))
