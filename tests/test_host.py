"""Where an encoder was compared, and what is different here."""

from __future__ import annotations

import platform
import subprocess
import sys

import onnxruntime
import PIL
import pytest

from byol_deploy.host import describe_host, differences


def test_this_machine_is_described_in_short_texts() -> None:
    found = describe_host(threads=3)
    assert all(isinstance(value, str) and len(value) <= 200 for value in found.values())
    assert found["machine"] == platform.machine()
    assert found["runtime"] == f"onnxruntime {onnxruntime.__version__}"
    assert found["pillow"] == PIL.__version__
    assert found["threads"] == "3"
    assert found["provider"] == "cpu"
    assert found["gpu"] == ""
    assert int(describe_host()["threads"]) >= 1
    assert found["jpeg"].startswith("libjpeg")
    assert describe_host(runtime="a-runtime-of-nobody")["runtime"] == "a-runtime-of-nobody unknown"


def test_the_same_machine_does_not_differ_from_itself() -> None:
    assert differences(describe_host(), describe_host()) == ()


@pytest.mark.parametrize(
    ("key", "then", "said"),
    [
        ("instructions", "AVX2, AVX-512, VNNI", "instruction set: exported with AVX2, AVX-512, VNNI; here NEON"),
        ("provider", "cuda", "provider: exported with cuda; here cpu"),
        ("threads", "2", "threads: exported with 2; here 1"),
        ("runtime", "onnxruntime 1.31.1", "runtime: exported with onnxruntime 1.31.1; here onnxruntime 1.28.0"),
        ("pillow", "13.0.0", "Pillow: exported with 13.0.0; here 12.0.0"),
        ("jpeg", "", "JPEG decoder: exported with unknown; here libjpeg-turbo 3.0"),
        ("machine", "x86_64", "machine: exported with x86_64; here aarch64"),
        ("optimization", "none", "graph optimisation: exported with none; here all"),
    ],
)
def test_each_difference_is_a_sentence(key: str, then: str, said: str) -> None:
    now = {
        "machine": "aarch64",
        "instructions": "NEON",
        "provider": "cpu",
        "threads": "1",
        "runtime": "onnxruntime 1.28.0",
        "pillow": "12.0.0",
        "jpeg": "libjpeg-turbo 3.0",
        "optimization": "all",
        "cpu": "a board",
        "cores": "4",
        "numpy": "2.0",
    }
    assert differences(now | {key: then}, now) == (said,)
    # What cannot change numbers is not told, and what was not noted is not compared.
    assert differences(now | {"cores": "64", "numpy": "1.26", "cpu": "another"}, now) == ()
    assert differences({}, now) == ()


def test_without_a_list_of_instructions_the_processors_name_must_do() -> None:
    then, now = {"cpu": "M4", "instructions": ""}, {"cpu": "M1", "instructions": ""}
    assert differences(then, now) == ("processor: exported with M4; here M1",)
    assert differences(then, then) == ()


def test_describing_loads_no_torch() -> None:
    code = "import sys; from byol_deploy.host import describe_host; print(describe_host(runtime='torch')['runtime']); "
    said = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert said[0] == "torch"
    assert said[-1] == "False"
