"""What runs in LiteRT's own environment, as a script: ``python _litert_worker.py request.json answer.json``.

It knows nothing of byol-deploy. Three tasks: ``convert`` a ``torch.export`` program, name the ``layers`` of a
``.tflite`` file that can be quantised, and ``quantize`` it.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

_KINDS = ("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE", "FULLY_CONNECTED", "BATCH_MATMUL")
_SIGNATURE = "serving_default"


def convert(request: dict[str, Any]) -> dict[str, Any]:
    """A ``.pt2`` file, which takes ``images`` by name, as a ``.tflite`` file."""
    torch = importlib.import_module("torch")
    litert_torch = importlib.import_module("litert_torch")
    module = torch.export.load(request["source"]).module()
    side = request["side"]
    images = torch.zeros((1, side, side, 3), dtype=torch.uint8)
    model = litert_torch.convert(module, sample_kwargs={"images": images})
    model.export(request["target"])
    return {"version": getattr(litert_torch, "__version__", "")}


def layers(request: dict[str, Any]) -> dict[str, Any]:
    """The operations with weights of a ``.tflite`` file, by the name that the quantiser knows them by, in order."""
    utils = importlib.import_module("ai_edge_quantizer.utils.tfl_flatbuffer_utils")
    model = utils.read_model(request["source"])
    kinds = {code: str(name.value) for code, name in utils.TFL_OP_CODE_TO_NAME.items()}
    found = []
    for subgraph in model.subgraphs:
        for operation in subgraph.operators:
            kind = kinds.get(model.operatorCodes[operation.opcodeIndex].builtinCode, "")
            if kind in _KINDS:
                found.append({"kind": kind, "scope": utils.get_op_scope(operation, subgraph.tensors)})
    return {"layers": found}


def quantize(request: dict[str, Any]) -> dict[str, Any]:
    """The layers of a float32 ``.tflite`` file in 8 bits, those ``kept`` left out; what lies between stays float32."""
    import re

    numpy = importlib.import_module("numpy")
    quantizer = importlib.import_module("ai_edge_quantizer.quantizer")
    recipe = importlib.import_module("ai_edge_quantizer.recipe")
    (every,) = getattr(recipe, request["recipe"])()
    tool = quantizer.Quantizer(request["source"], [{**every, "operation": kind} for kind in _KINDS])
    for scope in request["kept"]:
        tool.update_quantization_recipe(
            f"^{re.escape(scope)}$",
            recipe.TFLOperationName.ALL_SUPPORTED,
            algorithm_key=recipe.AlgorithmName.NO_QUANTIZE,
        )
    result = None
    if tool.need_calibration:
        images = numpy.load(request["images"], allow_pickle=False)
        result = tool.calibrate({_SIGNATURE: [{"images": image[None]} for image in images]})
    tool.quantize(result).export_model(request["target"], overwrite=True)
    return {}


def main() -> None:
    """Do the task that the request names; whatever goes wrong is one sentence of the answer."""
    asked, answered = map(Path, sys.argv[1:])
    request = json.loads(asked.read_text(encoding="utf-8"))
    try:
        answer = {"convert": convert, "layers": layers, "quantize": quantize}[request["task"]](request)
    except Exception as error:
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        near = next((line for line in lines if line.startswith("While executing")), "")
        answer = {"error": f"{type(error).__name__}: {lines[0][:300]}{f' ({near[:200]})' if near else ''}"}
    answered.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
