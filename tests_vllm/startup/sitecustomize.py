"""Lets a torchvision built for GPUs be imported beside a torch built for CPUs alone.

Its compiled part does not load there, and its Python part then stumbles over two operators of object detection that
nothing here uses. Declared before it is imported, in every process: vLLM starts some of its own.
"""

import sys


class DeclareOperators:
    library = None  # its operators live as long as it does

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision" and cls.library is None:
            import torch

            cls.library = torch.library.Library("torchvision", "DEF")
            cls.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            cls.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, DeclareOperators)
