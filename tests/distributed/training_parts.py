"""What tests of the loop share beside the small models and rows of `longvila.bench.engines`."""

import torch

from longvila.shards.bad import BadSamples


class RowList:
    """The loader's interface over rows in memory."""

    image_size = 32

    def __init__(self, rows, max_bad_share=1.0):
        self.rows = rows
        self.bad = BadSamples(max_bad_share)

    def epoch(self, epoch, skip=0):
        return iter(self.rows[skip:])


def whole_weights(model) -> dict[str, torch.Tensor]:
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for n, p in model.named_parameters()}
