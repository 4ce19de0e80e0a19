"""What tests of the loop share beside the small models and rows of `longvila.bench.engines`."""

from dataclasses import replace
from types import SimpleNamespace

import torch

from longvila.parallel.packed import whole
from longvila.shards.bad import BadSamples
from longvila.train.gradients import FRAME


class RowList:
    """The loader's interface over rows in memory."""

    image_size = 32
    encode = SimpleNamespace(frame_token=FRAME, tokens_per_frame=4)

    def __init__(self, rows, max_bad_share=1.0):
        self._rows = rows
        self.bad = BadSamples(max_bad_share)

    def rows(self, start):
        for number, row in enumerate(self._rows[start.row :], start.row + 1):
            yield row, replace(start, row=number)


def whole_weights(model) -> dict[str, torch.Tensor]:
    return {n: whole(p).detach() for n, p in model.named_parameters()}
