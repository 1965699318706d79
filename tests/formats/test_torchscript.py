"""TorchScript files mean float32 by float32, on GPUs too, whatever the process that wrote or runs them has set."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from byol_deploy.formats._torch_program import without_tf32
from byol_deploy.formats._tracing import quiet


def precisions() -> tuple[str, ...]:
    switches = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    return tuple(switch.fp32_precision for switch in switches)


def test_convolutions_in_a_file_do_not_round_to_tf32(tiny_bundle: Path) -> None:
    assert torch.backends.cudnn.allow_tf32, "PyTorch's default, under which the file was written"
    with quiet():
        graph = torch.jit.load(str(tiny_bundle / "model.torchscript.pt")).inlined_graph
    convolutions = graph.findAllNodes("aten::_convolution")
    assert len(convolutions) > 3
    for node in convolutions:
        *_, last = node.inputs()
        assert node.schema().endswith("bool cudnn_enabled, bool allow_tf32) -> Tensor")
        assert last.toIValue() is False


def test_what_was_set_before_is_set_again_after_the_last_thread() -> None:
    before = precisions()
    other_left = threading.Event()

    def other() -> None:
        with without_tf32():
            pass
        other_left.set()

    with without_tf32():
        threading.Thread(target=other).start()
        assert other_left.wait(10)
        assert precisions() == ("ieee",) * 3
    assert precisions() == before
    assert torch.backends.cudnn.allow_tf32


def test_what_was_set_before_is_set_again_after_an_error() -> None:
    before = precisions()
    with pytest.raises(ValueError, match="broken"), without_tf32():
        raise ValueError("broken")
    assert precisions() == before
