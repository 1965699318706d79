"""A real, tiny encoder in ONNX with a bundle around it, made without training; a helper of the torch-free tests.

Tests load it with ``runpy.run_path``: test folders are not packages. The expected outputs come from NumPy.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from byol_deploy import formats
from byol_deploy.bundle import (
    Artefact,
    ExtraFile,
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
    seal_artefact,
    sha256_file,
)
from byol_deploy.golden import pixels_hash
from byol_deploy.host import describe_host
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


def image_files() -> dict[str, bytes]:
    """Image files as they come: lossless grey, transparent and lying on its side, and a JPEG that lies so too."""
    draw = np.random.default_rng(2)
    tag = Image.Exif()
    tag[0x0112] = 6
    made = {}
    for name, mode in (("grey.png", "L"), ("alpha.png", "RGBA"), ("exif-6.png", "RGB"), ("exif-6.jpg", "RGB")):
        packed = io.BytesIO()
        image = Image.fromarray(draw.integers(0, 256, (24, 40, 4), dtype=np.uint8)).convert(mode)
        if name.endswith("jpg"):
            image.save(packed, "JPEG", exif=tag)
        else:
            image.save(packed, "PNG", **({"exif": tag} if "exif" in name else {}))
        made[name] = packed.getvalue()
    return made


def make_golden(preprocessing: Preprocessing, seed: int = 0, files: Mapping[str, bytes] | None = None) -> Golden:
    side = preprocessing.size_px
    # Brighter and brighter: noise of one brightness has nearly one embedding.
    ceilings = np.array([60, 150, 256]).reshape(3, 1, 1, 1)
    images = np.random.default_rng(1).integers(0, ceilings, (3, side, side, 3)).astype(np.uint8)
    pixels = preprocessing.batch((files or {}).values())
    return Golden(
        images,
        expected(images, preprocessing, seed),
        files=dict(files or {}),
        pixels_sha256={name: pixels_hash(image) for name, image in zip(files or {}, pixels, strict=True)},
        file_outputs=expected(pixels, preprocessing, seed) if files else {},
    )


def write_bundle(
    target: Path,
    side: int = 16,
    seed: int = 0,
    *,
    sealed: bool = True,
    precision: str = "fp32",
    golden: Golden | None = None,
    **save: object,
) -> Path:
    preprocessing = Preprocessing(side, side + 4)
    golden = golden or make_golden(preprocessing, seed, image_files() if sealed else None)
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
        path = folder / "model.onnx"
        write_onnx(path, preprocessing, carry(manifest, golden, sealed=sealed), seed, **save)
        further = [item for item in folder.iterdir() if item.name.startswith("model.onnx.")]
        if sealed:
            seal_artefact(path, formats.get("onnx"), precision, describe_host(), tuple(item.name for item in further))
        written = Artefact(
            file="model.onnx",
            format="onnx",
            precision=precision,
            sha256=sha256_file(path),
            bytes=path.stat().st_size,
            extra_files=tuple(ExtraFile(item.name, sha256_file(item), item.stat().st_size) for item in further),
            parity={"passed": True},
            host={"cpu": "a test machine"},
        )
        replace(
            manifest,
            golden=GoldenFile("golden.npz", sha256_file(folder / "golden.npz"), len(golden.images)),
            artefacts=(written,),
        ).save(folder)
    return target
