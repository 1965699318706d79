"""A real, tiny encoder in ONNX with a bundle around it, made without training; a helper of the torch-free tests.

Tests load it with ``runpy.run_path``: test folders are not packages. The expected outputs come from NumPy.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from byol_deploy.bundle import (
    Artefact,
    Golden,
    GoldenFile,
    InputContract,
    Manifest,
    ModelInfo,
    Output,
    carry,
    golden_to_bytes,
    parameter_hash,
    publish,
    sha256_file,
)
from byol_deploy.preprocess import Preprocessing

WIDTHS = {"embedding": 8, "projection": 4, "prediction": 4}


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    shapes = {"conv": (8, 3, 3, 3), "project": (8, 4), "predict": (4, 4)}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def expected(images: np.ndarray, preprocessing: Preprocessing, seed: int = 0) -> dict[str, np.ndarray]:
    """The encoder in NumPy: normalise, 3 x 3 convolution of stride 2, ReLU, mean, two linear maps."""
    parts = weights(seed)
    x = preprocessing.normalize(images).astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::2, ::2]
    features = np.einsum("nchwij,ocij->nohw", windows, parts["conv"].astype(np.float64))
    embedding = np.maximum(features, 0).mean(axis=(2, 3))
    projection = embedding @ parts["project"]
    found = {"embedding": embedding, "projection": projection, "prediction": projection @ parts["predict"]}
    return {name: value.astype(np.float32) for name, value in found.items()}


def write_onnx(
    path: Path, preprocessing: Preprocessing, metadata: dict[str, str], seed: int = 0, **save: object
) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    side = preprocessing.size_px
    constants = {
        **weights(seed),
        "scale": np.float32(255).reshape(()),
        "mean": np.array(preprocessing.mean, np.float32),
        "std": np.array(preprocessing.std, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["floats", "scale"], ["unit"]),
        helper.make_node("Sub", ["unit", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normal"]),
        helper.make_node("Transpose", ["normal"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "conv"], ["features"], strides=[2, 2]),
        helper.make_node("Relu", ["features"], ["positive"]),
        helper.make_node("GlobalAveragePool", ["positive"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["embedding"]),
        helper.make_node("MatMul", ["embedding", "project"], ["projection"]),
        helper.make_node("MatMul", ["projection", "predict"], ["prediction"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", side, side, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width]) for name, width in WIDTHS.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, metadata)
    onnx.save(model, str(path), **save)


def write_bundle(target: Path, side: int = 16, seed: int = 0) -> Path:
    preprocessing = Preprocessing(side, side + 4)
    images = np.random.default_rng(1).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    golden = Golden(images, expected(images, preprocessing, seed))
    manifest = Manifest(
        model=ModelInfo(
            backbone="tests/tiny",
            width=WIDTHS["embedding"],
            parameters=sum(value.size for value in weights(seed).values()),
            parameter_hash=parameter_hash(weights(seed)),
            checkpoint_sha256="0" * 64,
            global_step=10,
            epoch=2,
            stripped_keys=("backbone_momentum.conv", "projection_head_momentum.project"),
        ),
        input=InputContract(preprocessing),
        outputs=tuple(Output(name, width) for name, width in WIDTHS.items()),
        limits={name: {"noise_rel_l2": 1e-7, "rel_l2": 1e-4, "cosine": 0.9999} for name in WIDTHS},
        created="2026-01-02T03:04:05Z",
        recipe={"seed": 0},
    )
    with publish(target) as folder:
        (folder / "golden.npz").write_bytes(golden_to_bytes(golden))
        write_onnx(folder / "model.onnx", preprocessing, carry(manifest, golden), seed)
        written = Artefact(
            file="model.onnx",
            format="onnx",
            precision="fp32",
            sha256=sha256_file(folder / "model.onnx"),
            bytes=(folder / "model.onnx").stat().st_size,
            parity={"passed": True},
            host={"cpu": "a test machine"},
        )
        replace(
            manifest,
            golden=GoldenFile("golden.npz", sha256_file(folder / "golden.npz"), len(images)),
            artefacts=(written,),
        ).save(folder)
    return target
