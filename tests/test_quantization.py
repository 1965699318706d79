"""The search for a reduced file: on a network of four matrices whose weights are really rounded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import pytest

from byol_deploy.errors import UsageError
from byol_deploy.quantization import (
    Calibration,
    Goal,
    Outliers,
    Trade,
    Trial,
    resolve_target,
    search,
    targets,
    this_target,
)
from byol_deploy.quantization.searching import _choose, _give_up

WIDTH = 24
IMAGES = np.random.default_rng(1).integers(0, 256, (64, 4, 4, 3), dtype=np.uint8)
CALIBRATION = Calibration(IMAGES[:16], "x86")
LAYERS = ("a", "b", "c", "d")
# Levels of the weights: the fewer, the worse. "b" is the worst of all and "d" the second.
LEVELS = {"a": 4000, "b": 2, "c": 4000, "d": 9}


def weights() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = {"a": (48, WIDTH), "b": (WIDTH, WIDTH), "c": (WIDTH, WIDTH), "d": (WIDTH, 12)}
    return {name: draw.normal(size=shape) / math.sqrt(shape[0]) for name, shape in shapes.items()}


def compute(matrices: Mapping[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    values = images.reshape(len(images), -1) / 128.0 - 1
    for name in LAYERS[:-1]:
        values = np.maximum(values @ matrices[name], 0)
    result: np.ndarray = (values @ matrices["d"]).astype(np.float32)
    return result


class Rounding:
    """Writes the matrices as an .npz file, those that are not kept on a grid."""

    methods: tuple[str, ...] = ("coarse", "fine")
    layers = LAYERS

    def __init__(self, levels: Mapping[str, float] = LEVELS, nan: bool = False) -> None:
        self.levels, self.nan = levels, nan
        self.written: list[tuple[str, tuple[str, ...]]] = []

    def write(self, path: Path, carried: Mapping[str, str], method: str, kept: Collection[str]) -> tuple[Path, ...]:
        self.written.append((method, tuple(kept)))
        made = {}
        for name, matrix in weights().items():
            levels = self.levels[name] / (2 if method == "coarse" else 1)
            step = np.ptp(matrix) / levels
            made[name] = matrix if name in kept else np.round(matrix / step) * step
            if self.nan and name not in kept:
                made[name] = np.full_like(matrix, np.nan)
        np.savez(path, **made)
        return ()


def opened(path: Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    with np.load(path) as content:
        matrices = dict(content)
    return lambda images: {"embedding": compute(matrices, images)}


def slow(images: np.ndarray) -> dict[str, np.ndarray]:
    # Longer than any of the files takes, so that these are faster.
    for _ in range(40):
        found = compute(weights(), images)
    return {"embedding": found}


def run(reducer: Rounding, tmp_path: Path, goal: Goal | None = None, full: object = slow, **options: object) -> Trade:
    return search(
        reducer, opened, full, IMAGES[16:], {"embedding": compute(weights(), IMAGES[16:])}, precision="int8",
        calibration=CALIBRATION, goal=goal or Goal(0.98, 0.25), scratch=tmp_path / "trial.npz", **options,  # type: ignore[arg-type]
    )  # fmt: skip


def test_the_fewest_layers_go_back_that_reach_the_goal(tmp_path: Path) -> None:
    trade = run(Rounding(), tmp_path)
    assert trade.chosen is not None, trade.reason
    assert trade.chosen.method == "fine"
    assert trade.chosen.kept == ("b", "d"), trade.table()
    assert trade.chosen.passed
    assert max(trade.sensitivity, key=lambda name: trade.sensitivity[name]) == "b"
    assert not next(trial for trial in trade.trials if trial.kept == ("b",)).passed
    document = trade.to_dict()
    assert document["kept"] == ["b", "d"]
    assert len(document["trials"]) == len(trade.trials)
    assert "chosen" in trade.table()


@pytest.mark.parametrize("dear", ["b", "d"])
def test_what_spares_most_for_its_time_goes_back_first(dear: str, tmp_path: Path) -> None:
    reducer = Rounding({"a": 4000, "b": 7, "c": 4000, "d": 7})

    def waiting(path: Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        kept, found = reducer.written[-1][1], opened(path)

        def compute(images: np.ndarray) -> dict[str, np.ndarray]:
            time.sleep(0.004 if dear in kept else 0.001)
            return found(images)

        return compute

    expected = {"embedding": compute(weights(), IMAGES[16:])}

    def firsts(must_be_faster: bool) -> list[tuple[str, ...]]:
        trade = search(
            reducer, waiting, slow, IMAGES[16:], expected, precision="int8", calibration=CALIBRATION, goal=Goal(),
            scratch=tmp_path / "trial.npz", must_be_faster=must_be_faster,
        )  # fmt: skip
        return [trial.kept for trial in trade.trials if len(trial.kept) == 1]

    assert firsts(True) == [("d" if dear == "b" else "b",)]
    assert not list(tmp_path.glob("*none*")), "the file that layers are compared with is gone"
    assert len({*firsts(False)}) == 1, "on another processor than the target's only the drift counts"


def trial(kept: int, agreement: float, latency: float = 0.5) -> Trial:
    return Trial("", LAYERS[:kept], agreement, 0.1, 0.1, 0.1, latency, 1, passed=agreement >= 0.98)


@pytest.mark.parametrize(
    ("trials", "kept"),
    [
        pytest.param([trial(0, 0.9), trial(1, 0.982), trial(2, 0.992), trial(3, 1.0)], 2, id="half of the loss"),
        pytest.param([trial(0, 0.9), trial(1, 0.982), trial(2, 0.985)], 2, id="the most neighbours"),
        pytest.param([trial(1, 0.982), trial(2, 0.992, latency=1.1)], 1, id="faster comes first"),
        pytest.param([trial(1, 0.982), trial(4, 1.0)], 1, id="all layers is no choice"),
    ],
)
def test_the_first_of_several_that_is_just_good_enough_is_not_trusted(trials: list[Trial], kept: int) -> None:
    chosen, reason = _choose(trials, lambda one: one.agreement >= 0.99, Goal(), "int8", True, len(LAYERS))
    assert chosen is not None, reason
    assert len(chosen.kept) == kept


def test_a_kept_layer_that_spares_nothing_beside_the_others_is_given_up() -> None:
    asked = []

    def measured(kept: tuple[str, ...]) -> Trial:
        asked.append(kept)
        # "b" and "c" do the same, and "a" is needed.
        return trial(len(kept), 0.995 if "a" in kept and {"b", "c"} & set(kept) else 0.9)

    _give_up("abcd", ("b", "a", "c"), measured, lambda one: one.agreement >= 0.99)
    assert asked == [("a", "c", "d"), ("c", "d"), ("a", "d")], "the dear ones in turn, and no other"
    asked.clear()
    _give_up(("a",), ("a",), measured, lambda one: True)
    assert asked == [], "a file with none kept was measured before"


def test_a_file_that_reaches_the_goal_at_once_costs_no_search(tmp_path: Path) -> None:
    reducer = Rounding(dict.fromkeys(LAYERS, 4000))
    trade = run(reducer, tmp_path)
    assert trade.chosen is not None
    assert trade.chosen.kept == ()
    assert trade.sensitivity == {}
    assert reducer.written == [("coarse", ()), ("fine", ())]


def test_a_goal_out_of_reach_is_said_with_what_was_reached(tmp_path: Path) -> None:
    reducer = Rounding(dict.fromkeys(LAYERS, 2))
    reducer.layers = ()  # type: ignore[assignment]
    trade = run(reducer, tmp_path)
    assert trade.chosen is None
    assert "int8 cannot reach the goal" in trade.reason
    assert "--agreement" in trade.reason


def test_a_slower_file_is_no_choice_where_its_time_says_something(tmp_path: Path) -> None:
    def quick(images: np.ndarray) -> dict[str, np.ndarray]:
        return {"embedding": np.zeros((len(images), 12), np.float32)}

    trade = run(Rounding(), tmp_path, full=quick)
    assert trade.chosen is None
    assert "is not faster here" in trade.reason
    assert run(Rounding(), tmp_path, full=quick, must_be_faster=False).chosen is not None


def test_outputs_that_are_no_numbers_never_pass(tmp_path: Path) -> None:
    trade = run(Rounding(nan=True), tmp_path)
    assert trade.chosen is None
    assert "reaches the goal only with all 4 layers in float32" in trade.reason
    assert not any(trial.passed for trial in trade.trials if len(trial.kept) < 4)
    assert all(value is None or math.isfinite(value) for trial in trade.to_dict()["trials"]
               for value in [trial["margin"], trial["drift"]])  # fmt: skip


def test_odd_images_count_too(tmp_path: Path) -> None:
    odd = np.zeros((3, 4, 4, 3), np.uint8)
    expected, margins = compute(weights(), odd), {"embedding": 0.5}
    assert run(Rounding(), tmp_path, outliers=Outliers(odd, {"embedding": expected}, margins)).chosen is not None
    wrong = Outliers(odd, {"embedding": -expected}, margins)
    trade = run(Rounding(), tmp_path, outliers=wrong)
    assert trade.chosen is None
    assert all(trial.outliers > 1 for trial in trade.trials)


def test_too_few_images_to_judge_by(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 images say nothing about neighbours"):
        search(Rounding(), opened, slow, IMAGES[:3], {"embedding": compute(weights(), IMAGES[:3])}, precision="int8",
               calibration=CALIBRATION, goal=Goal(), scratch=tmp_path / "trial.npz")  # fmt: skip


@pytest.mark.parametrize(("agreement", "margin"), [(0.0, 0.2), (1.2, 0.2), (0.9, 0.0), (0.9, 2.0)])
def test_a_goal_that_is_none(agreement: float, margin: float) -> None:
    with pytest.raises(UsageError, match="above 0 and up to 1"):
        Goal(agreement, margin)


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        ("x86_64", "AVX512-VNNI"): "x86-vnni", ("AMD64", "AVX-VNNI"): "x86-vnni", ("x86_64", "AVX2"): "x86",
        ("aarch64", "SDOT"): "arm64", ("arm64", ""): "arm64", ("riscv64", ""): None,
    }  # fmt: skip
    for (machine, feature), expected in cases.items():
        monkeypatch.setattr(targets.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(targets, "cpu", lambda feature=feature: {"features": {feature: True}})
        assert this_target() == expected
        if expected is None:
            with pytest.raises(UsageError, match="is none of the targets"):
                resolve_target("this")
        else:
            assert resolve_target("this") == (expected, True)
            assert resolve_target("arm64") == ("arm64", expected == "arm64")
    with pytest.raises(UsageError, match="'avr' does not exist; use this, x86-vnni"):
        resolve_target("avr")
