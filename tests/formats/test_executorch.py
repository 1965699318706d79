"""ExecuTorch files: int8, threads, a bound of the batch size, and what it cannot express."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byol_deploy import formats
from byol_deploy.errors import BundleError, ExportError, ProviderError
from byol_deploy.formats import Port, RunOptions, Signature
from byol_deploy.quantization import Calibration

for package in formats.get("executorch").requires:
    pytest.importorskip(package)

SIZE = 16
SIGNATURE = Signature(SIZE, ("embedding", "projection"))


class Encoder(torch.nn.Module):
    """Convolutions with and without batch norm after them, a sum, a layer that is called twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.BatchNorm2d(16), torch.nn.ReLU())
        self.twice = torch.nn.Conv2d(16, 16, 3, 1, 1)
        self.once = torch.nn.Conv2d(16, 16, 1)
        self.norm = torch.nn.BatchNorm2d(16)
        self.last = torch.nn.Conv2d(16, 64, 3, 2, 1)
        self.head = torch.nn.Linear(64, 8)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.stem(images.permute(0, 3, 1, 2).float() / 255)
        x = self.once(x + self.twice(self.twice(x)))
        y = self.last(self.norm(x).relu()).relu().mean((2, 3))
        return y, self.head(y)


def images(n: int) -> np.ndarray:
    """Smooth ones: neighbours among pure noise would be noise."""
    draw = np.random.default_rng(n)
    small = torch.from_numpy(draw.uniform(0, 255, (n, 3, 4, 4)))
    large = torch.nn.functional.interpolate(small, size=SIZE, mode="bilinear")
    return large.permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy()


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    model = Encoder()
    with torch.no_grad():
        model.train()(torch.from_numpy(images(64)))
    return model.eval()


@pytest.fixture(scope="module")
def path(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("executorch") / "model.pte"
    formats.get("executorch").export(encoder, SIGNATURE, found, {})
    return found


@pytest.fixture(scope="module")
def reduce(encoder: Encoder, path: Path) -> Any:
    return formats.get("executorch").reducer(encoder, SIGNATURE, path, "int8", Calibration(images(32), "x86"))


def expected(encoder: Encoder, pixels: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(encoder(torch.from_numpy(pixels))[0])


def drift(actual: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(actual - wanted) / np.linalg.norm(wanted - wanted.mean(axis=0)))


def test_the_file_says_what_it_takes_and_gives(path: Path) -> None:
    opened = formats.get("executorch").load(path, RunOptions())
    assert opened.inputs == (Port("images", "uint8", (None, SIZE, SIZE, 3)),)
    assert opened.outputs == (Port("embedding", "float32", (None, 64)), Port("projection", "float32", (None, 8)))
    assert opened.provider == "XnnpackBackend"
    assert list(opened.compute(images(2), ["projection"])) == ["projection"]


def test_executorch_alone_runs_it(path: Path, encoder: Encoder) -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); sys.modules['byol_deploy'] = None;"
        "import torch; from executorch.runtime import Runtime;"
        "program = Runtime.get().load_program(sys.argv[1]);"
        "pixels = torch.full((8, 16, 16, 3), 7, dtype=torch.uint8);"
        "print(program.load_method('output_names').execute([])[0], program.load_method('max_batch').execute([])[0],"
        " program.load_method('forward').execute([pixels])[0][7, :3].tolist())"
    )
    found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    names, bound, *values = found.split(maxsplit=2)
    assert (names, bound) == ("embedding,projection", "8")
    wanted = expected(encoder, np.full((1, SIZE, SIZE, 3), 7, np.uint8))[0, :3]
    assert np.allclose(np.fromstring(values[0].strip("[]\n"), sep=","), wanted, rtol=1e-5, atol=1e-6)


def test_equal_graphs_give_equal_bytes(path: Path, encoder: Encoder, tmp_path: Path) -> None:
    formats.get("executorch").export(encoder, SIGNATURE, tmp_path / "again.pte", {})
    assert (tmp_path / "again.pte").read_bytes() == path.read_bytes()


def test_sessions_of_unequal_threads_take_turns(
    path: Path, encoder: Encoder, capfd: pytest.CaptureFixture[str]
) -> None:
    """The pool of threads is made anew under methods that are loaded: a method that kept the old one would crash."""
    sessions = [formats.get("executorch").load(path, RunOptions(threads=number)) for number in (1, 2, 1, 3)]
    pixels = images(9)
    wanted = expected(encoder, pixels)
    for _ in range(3):
        for session in sessions:
            assert np.allclose(session(pixels)["embedding"], wanted, rtol=1e-4, atol=1e-5)
    assert capfd.readouterr() == ("", "")


def test_callers_in_several_threads_get_their_own_values(path: Path, encoder: Encoder) -> None:
    session = formats.get("executorch").load(path, RunOptions(threads=1))
    batches = [images(n) for n in (1, 3, 8, 11, 2, 5)] * 3
    with ThreadPoolExecutor(4) as pool:
        for pixels, found in zip(batches, pool.map(session, batches), strict=True):
            assert np.allclose(found["embedding"], expected(encoder, pixels), rtol=1e-4, atol=1e-5)


def test_int8_is_smaller_and_near(path: Path, reduce: Any, encoder: Encoder, tmp_path: Path) -> None:
    assert reduce.layers == ("stem.0", "once", "last", "head"), (
        "a layer that is called twice has one bias for two scales"
    )
    pixels = images(40)
    wanted = expected(encoder, pixels)
    found = {}
    for method in reduce.methods:
        small = tmp_path / f"{method}.pte"
        further = reduce.write(small, {"note": "x"}, method, ())
        assert [item.name for item in further] == [f"{method}.pte.byol.json"]
        assert formats.get("executorch").carried(small) == {"note": "x"}
        assert small.stat().st_size < 0.8 * path.stat().st_size
        found[method] = formats.get("executorch").load(small, RunOptions())(pixels)
        assert 1e-3 < drift(found[method]["embedding"], wanted) < 0.1
        assert tuple(found[method]) == SIGNATURE.outputs
    assert not np.array_equal(found["minmax"]["embedding"], found["histogram"]["embedding"])


def test_layers_that_are_kept_are_float32_again(reduce: Any, encoder: Encoder, tmp_path: Path) -> None:
    pixels = images(40)
    wanted = expected(encoder, pixels)

    def written(kept: tuple[str, ...]) -> tuple[float, int]:
        reduce.write(tmp_path / "x.pte", {}, "minmax", kept)
        values = formats.get("executorch").load(tmp_path / "x.pte", RunOptions())(pixels)["embedding"]
        return drift(values, wanted), (tmp_path / "x.pte").stat().st_size

    (all_drift, all_size), (some_drift, some_size), (none_drift, none_size) = map(
        written, [(), ("last",), reduce.layers]
    )
    assert all_drift > some_drift > 1e-3
    assert none_drift < 1e-5
    assert all_size < some_size < none_size


def test_int8_leaves_pytorchs_random_numbers_alone(reduce: Any, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    reduce.write(tmp_path / "x.pte", {}, "minmax", ())
    assert torch.equal(torch.get_rng_state(), before)


class Within(torch.nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.function(values)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda values: torch.erfinv(values).mean((2, 3)), r"aten\.erfinv\.default .* \(in inner\.1\)"),
        (lambda values: values.flatten(2).sort(-1)[0].mean(-1), r"no kernel for .*aten::sort\.values \(in inner\.1\)"),
    ],
)
def test_an_operator_that_is_not_there_is_named_with_its_layer(
    function: Callable[[torch.Tensor], torch.Tensor], said: str, tmp_path: Path
) -> None:
    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.ReLU(), Within(function))

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.inner(images.permute(0, 3, 1, 2).float() / 256),)

    with pytest.raises(ExportError, match=said):
        formats.get("executorch").export(Graph().eval(), Signature(SIZE, ("embedding",)), tmp_path / "x.pte", {})
    assert not (tmp_path / "x.pte").exists()


def test_what_depends_on_parameters_alone_is_computed_at_export(tmp_path: Path) -> None:
    """ExecuTorch has no bicubic resampling; of a position embedding it needs none."""

    class Positions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)))

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            table = torch.nn.functional.interpolate(self.table, size=(SIZE, SIZE), mode="bicubic", antialias=True)
            return ((images.permute(0, 3, 1, 2).float() / 255 + table).amax((2, 3)),)

    model = Positions().eval()
    formats.get("executorch").export(model, Signature(SIZE, ("embedding",)), tmp_path / "x.pte", {})
    values = formats.get("executorch").load(tmp_path / "x.pte", RunOptions())(images(3))["embedding"]
    with torch.no_grad():
        assert np.allclose(values, model(torch.from_numpy(images(3)))[0], rtol=1e-5, atol=1e-6)


def test_a_file_that_executorch_alone_wrote_is_refused(path: Path, tmp_path: Path) -> None:
    from byol_deploy.formats.executorch import silent

    with silent():
        from executorch.exir import to_edge

        example = (torch.zeros(2, 3),)
        content = to_edge(torch.export.export(torch.nn.ReLU(), example)).to_executorch().buffer
    foreign = tmp_path / "foreign.pte"
    foreign.write_bytes(content)
    (tmp_path / "foreign.pte.byol.json").write_bytes(path.with_name(f"{path.name}.byol.json").read_bytes())
    with pytest.raises(BundleError, match="not an ExecuTorch file of byol-deploy"):
        formats.get("executorch").load(foreign, RunOptions())


def test_half_a_file_is_a_bundle_error_and_nothing_is_printed(
    path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half.pte"
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "half.pte.byol.json").write_bytes(path.with_name(f"{path.name}.byol.json").read_bytes())
    with pytest.raises(BundleError, match="export it again"):
        formats.get("executorch").load(half, RunOptions())
    assert capfd.readouterr() == ("", "")


def test_another_provider_is_refused(path: Path) -> None:
    with pytest.raises(ProviderError, match="not on 'cuda'"):
        formats.get("executorch").load(path, RunOptions("cuda"))
