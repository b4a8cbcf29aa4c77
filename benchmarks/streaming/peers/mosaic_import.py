"""Imports MosaicML streaming, where torchvision's operators cannot be loaded too, and frees what a killed run left.

Streaming imports torchvision for vision alone. The registry's torchvision is built for CUDA and loads no operators
beside a torch for processors; two that it describes at import are declared here, and never called.
"""

from __future__ import annotations

__all__ = ["streaming"]

import torch

for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import streaming  # noqa: E402 - after the operators that it needs

streaming.base.util.clean_stale_shared_memory()
