"""A training step recorded as a CUDA graph: the host starts one graph instead of thousands of kernels.

Shape legend: V views (2), N samples, H and W pixels, C colours (3).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipelines.batch import ViewParams

WARM_UP_STEPS = 3  # ordinary ones: libraries choose their algorithms, and the optimizer makes its state

Step = Callable[[Tensor, ViewParams], Tensor]


class StepGraph:
    """Does what `step` does, which takes uint8 views (V, N, H, W, C) and their numbers and returns a tensor.

    `step` must never make the host wait, and must find everything that it changes in the same memory each
    time. After `WARM_UP_STEPS` calls it is recorded, and from then on replayed with each call's inputs; what
    Python does in it happens no more. Shapes must stay those of the first call.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._calls = 0
        self._graph = torch.cuda.CUDAGraph()
        self._warm_up_stream = torch.cuda.Stream()
        self._views_VNHWC: Tensor
        self._params: ViewParams
        self._result: Tensor

    def __call__(self, views_VNHWC: Tensor, params: ViewParams) -> Tensor:
        self._calls += 1
        if not self.is_recorded:
            return self._warm_up(views_VNHWC, params)
        if self._calls == WARM_UP_STEPS + 1:
            self._record(views_VNHWC, params)
        self._views_VNHWC.copy_(views_VNHWC)
        for name, held in vars(self._params).items():
            held.copy_(getattr(params, name))
        self._graph.replay()
        return self._result.clone()  # the next replay writes to the same memory

    @property
    def is_recorded(self) -> bool:
        return self._calls > WARM_UP_STEPS

    def _warm_up(self, views_VNHWC: Tensor, params: ViewParams) -> Tensor:
        """The ordinary step, on a stream of its own: what it leaves behind must not tie the graph to the
        default stream, which cannot be recorded. It is one stream for all these steps: each has a pool of
        memory, and what a step leaves behind may be used until the next one begins."""
        stream, current = self._warm_up_stream, torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = self._step(views_VNHWC, params)
        current.wait_stream(stream)
        result.record_stream(current)
        return result

    def _record(self, views_VNHWC: Tensor, params: ViewParams) -> None:
        """Recording does none of the work. Other threads, such as the loader's, may use the GPU meanwhile."""
        self._views_VNHWC = views_VNHWC.clone()
        self._params = ViewParams(**{name: held.clone() for name, held in vars(params).items()})
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = self._step(self._views_VNHWC, self._params)
