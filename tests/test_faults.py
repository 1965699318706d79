"""Deployment faults, really made on a small trained encoder: each is caught, and what is harmless passes.

The whole suite, on three encoders and with the neighbours' rules beside it, is benchmarks/faults; this is its part
that is quick.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
QUICK_FAULTS = (
    "momentum branch",
    "projector as embedding",
    "batch norm in training mode",
    "batch-norm epsilon",
    "mean and deviation",
    "BGR in the graph",
    "swapped layers",
    "NaN in the dark",
    "int8 cast of pixels",
    "baked batch",
    "stale contract: mean",
    "stale contract: resize",
    "flipped high bit",
    "flipped lowest bit",
    "stale external data",
    "dropout left on",
    "bilinear for bicubic",
    "no antialias",
    "crop off by one",
    "squashed",
    "EXIF ignored",
    "alpha over black",
    "16-bit clipped",
    "float16 overflow",
    "int8 calibrated on 0..1",
)
QUICK_HARMLESS = (
    "one thread",
    "no graph optimisation",
    "operator order",
    "batch norm folded",
    "weights in a second file",
    "float16",
    "channels last",
)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path, fashion: Path) -> Any:
    """The benchmark's package, the small encoder and its judges."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import faults
        from faults.judges import Judges
        from faults.subject import Subject

        subject = Subject.open("tiny", tiny_run, fashion, fashion, tmp_path_factory.mktemp("faults"))
        yield {case.name: case for case in faults.CASES}, subject, Judges(subject)
        for name in [name for name in sys.modules if name.partition(".")[0] in ("faults", "neighbour_rules")]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def rules() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import neighbour_rules

        yield neighbour_rules


@pytest.mark.parametrize("name", QUICK_FAULTS)
def test_caught(name: str, suite: Any, tmp_path: Path) -> None:
    cases, subject, judges = suite
    made = cases[name].make(subject, tmp_path)
    verdict = judges.ours(made)["byol-deploy"]
    assert verdict.mark == "caught"
    assert verdict.reason


@pytest.mark.parametrize("name", QUICK_HARMLESS)
def test_not_rejected(name: str, suite: Any, tmp_path: Path) -> None:
    cases, subject, judges = suite
    assert cases[name].harmless
    said = judges.ours(cases[name].make(subject, tmp_path))
    assert {judge: verdict.reason for judge, verdict in said.items() if verdict.mark != "missed"} == {}


def test_rescaling_keeps_the_function(suite: Any, tmp_path: Path) -> None:
    """float16's overflow and int8's unequal channels start from an encoder that computes the same, to the last bit."""
    import torch
    from faults.reduced import reference, rescaled_run

    _, subject, _ = suite
    run = rescaled_run(subject.run, tmp_path / "run", lambda channels: torch.full((channels,), 2.0**17))
    images = subject.test_images[:8]
    expected, found = subject.graph.run(images), reference(run)(images)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_a_neighbour_compares_with_the_module_that_was_exported(suite: Any, tmp_path: Path) -> None:
    cases, subject, judges = suite
    made = cases["mean and deviation"].make(subject, tmp_path)
    assert judges.neighbours(made)["timm"].mark == "missed"
    assert judges.neighbours_helped(made)["timm"].mark == "caught"


def test_a_runtime_is_given_back(suite: Any, tmp_path: Path) -> None:
    from byol_deploy.preprocess import Preprocessing

    before = Preprocessing.__call__
    cases, subject, _ = suite
    with cases["squashed"].make(subject, tmp_path).runtime():
        assert Preprocessing.__call__ is not before
    assert Preprocessing.__call__ is before


def test_rules_on_numbers(rules: Any) -> None:
    """Each rule just inside and just outside its documented tolerance, worked out by hand."""
    by_name = {rule.name: rule for rule in rules.RULES}

    def content(name: str, expected: float, actual: float) -> bool:
        return bool(by_name[name].content({"y": np.array([[expected]])}, {"y": np.array([[actual]])}))

    for name in ("torch.onnx verify", "lightly-train"):  # 5e-3 + 0.1 x 2 = 0.205
        assert content(name, 2.0, 2.204)
        assert not content(name, 2.0, 2.206)
    assert content("optimum-onnx", 1.0, 1 + 1.9e-5)  # 1e-5 + 1e-5 x 1
    assert not content("optimum-onnx", 1.0, 1 + 2.1e-5)
    assert content("timm", 100.0, 100.0014)
    assert not content("timm", 100.0, 100.0016)
    assert content("Polygraphy", 1000.0, 1000.009)  # relative
    assert content("Polygraphy", 1e-9, 9e-6)  # absolute
    assert not content("Polygraphy", 1.0, 1 + 1.1e-5)
    assert content("Olive", 0.0, 0.099)
    assert not content("Olive", 0.0, 0.101)
    assert content("ExecuTorch", 1.0, 1 + 0.9e-5)
    assert not content("ExecuTorch", 0.0, 2e-8)


def test_cosine_rule_is_over_the_whole_output(rules: Any) -> None:
    cosine = next(rule for rule in rules.RULES if rule.name == "Polygraphy cosine").content
    angle = np.arccos(0.997)
    expected = {"y": np.array([[1.0, 0.0]])}

    def turned(by: float) -> dict[str, np.ndarray]:
        return {"y": np.array([[np.cos(by), np.sin(by)]]) * 5}

    assert cosine(expected, turned(angle * 0.99))
    assert not cosine(expected, turned(angle * 1.01))
    assert not cosine(expected, {"y": np.array([[np.nan, 0.0]])})
    # One ruined image of a thousand does not show.
    many = np.ones((1000, 4))
    one_ruined = many.copy()
    one_ruined[0] = -1
    assert cosine({"y": many}, {"y": one_ruined})


def test_rules_refuse_other_forms_and_nan(rules: Any) -> None:
    good = {"y": np.zeros((2, 3))}
    for rule in rules.RULES:
        if rule.content is None:
            continue
        assert rule.content(good, good)
        assert not rule.content(good, {"z": np.zeros((2, 3))})
        assert not rule.content(good, {"y": np.zeros((2, 4))})
        assert not rule.content({"y": np.ones((2, 3))}, {"y": np.full((2, 3), np.nan)})
    assert rules.metric_kept(0.80, 0.7901, drop=0.01)
    assert not rules.metric_kept(0.80, 0.7899, drop=0.01)
