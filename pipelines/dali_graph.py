"""DALI's graph: one decode of each image, both crops from it and, where wanted, the distortions too.

CPU threads decode no more of an image than what both boxes span together, to PIL's pixels; the GPU's decoders
take whole images. Where the training is on a GPU, the graph goes on there to the crops. On the CPU it ends
with the decoded parts, since DALI resizes eight times slower than `resize_numba`, and less exactly; it goes
on only for its own distortions.

Shape legend: V views (2), N samples of this rank's batch, D numbers of a view (see `dali_distortions`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import do_not_convert
from nvidia.dali.tensors import TensorListCPU

from pipelines.batch import NUM_VIEWS, ViewParams
from pipelines.dali_distortions import distort, numbers_of
from pipelines.errors import DataError
from pipelines.two_crops import decode_and_crop

Device = Literal["cpu", "gpu"]

# What DALI has each thread reserve for nvJPEG unless told otherwise: bytes on the GPU, and on the host.
_DEVICE_MEMORY, _HOST_MEMORY = 16 << 20, 8 << 20
_LIKE_PIL = {"output_type": types.RGB, "adjust_orientation": False}
_BYTES_PER_PIXEL = 6  # nvJPEG's 16-bit coefficients of three planes that are not subsampled


class Fed(NamedTuple):
    """What a graph takes for one batch: C-contiguous memory, which DALI reads until the batch comes out."""

    encoded: list[np.ndarray]  # N times uint8 (bytes,)
    part_N22: np.ndarray  # int32: start and end (row, column) of the part of each image that is decoded
    boxes_NV22: np.ndarray  # int32: start and end (row, column) of the crops in that part
    numbers_NVD: np.ndarray  # float32: see `dali_distortions.numbers_of`

    def sample(self, n: int) -> "Fed":
        """What a graph for batches of one takes for sample n."""
        return Fed(*(part[n : n + 1] for part in self))


# The fields of `Fed` as DALI knows them: type, and number of dimensions per sample.
INPUTS = {
    "encoded": (types.UINT8, 1),
    "part_N22": (types.INT32, 2),
    "boxes_NV22": (types.INT32, 3),
    "numbers_NVD": (types.FLOAT, 2),
}


@dataclass(frozen=True)
class Graph:
    """What to build."""

    batch_size: int
    image_size: int  # of the crops, in pixels
    device: Device  # where the graph's outputs are
    decoder: Device  # where images are decoded; the GPU only if `device` is the GPU
    device_id: int | None  # None without a GPU
    num_threads: int
    prefetch: int  # batches
    distorts: bool
    hardware_share: float = 0.65  # of JPEGs for the GPU's own decoder
    reserved: int | None = None  # bytes per thread of the GPU's decoders; None for what `largest_HW` needs
    largest_HW: tuple[int, int] = (0, 0)  # of the image with the most pixels; 0 where unknown

    @property
    def makes_views(self) -> bool:
        return self.device == "gpu" or self.distorts

    def fed(self, encoded: list[np.ndarray], params: ViewParams) -> Fed:
        """What this graph takes for the image files `encoded` with the numbers `params`."""
        start_VN2, size_VN2 = np.split(params.box_VN4.numpy(), 2, axis=2)
        end_VN2 = start_VN2 + size_VN2
        part_N22 = np.stack([start_VN2.min(axis=0), end_VN2.max(axis=0)], axis=1)
        if self.decoder == "gpu":
            part_N22[:, 0] = 0  # the crops are counted from the corner of the whole image
        boxes_VN22 = np.stack([start_VN2, end_VN2], axis=2) - part_N22[:, :1]
        return Fed(encoded, part_N22, np.ascontiguousarray(boxes_VN22.swapaxes(0, 1)), numbers_of(params))

    def build(self, feed: Callable[[], Fed]) -> Pipeline:
        """A pipeline that makes both views, or one output, the decoded part of each image.

        All are uint8 (H, W, C) per sample, on `device`. Its `run` calls `feed` once for each batch, some
        batches before that comes out. Raises `DataError` where DALI does not start.
        """
        names = [name for name in INPUTS if self._takes(name)]

        def take() -> list:
            fed = feed()
            return [getattr(fed, name) for name in names]

        try:
            pipeline = _outputs(
                self,
                take,
                names,
                batch_size=self.batch_size,
                num_threads=self.num_threads,
                device_id=self.device_id,
                prefetch_queue_depth=self.prefetch,
                exec_dynamic=True,  # an output stays valid for as long as it is referenced
            )
            pipeline.build()
        except RuntimeError as error:
            raise DataError(
                f"DALI does not start ({reason(error)}); set data.loader to ffcv or folder."
            ) from error
        return pipeline

    def failing(self, fed: Fed) -> list[int]:
        """The samples of `fed` for which DALI fails, each tried alone. Raises `DataError` as `build` does."""
        alone = replace(self, batch_size=1, num_threads=1, prefetch=1)
        samples = (fed.sample(n) for n in range(len(fed.encoded)))
        pipeline = alone.build(samples.__next__)
        failing: list[int] = []
        for n in range(len(fed.encoded)):
            try:
                pipeline.run()
            except RuntimeError:
                failing.append(n)
                pipeline = alone.build(samples.__next__)  # the failed one is of no more use
        return failing

    def decode_whole(self, encoded: DataNode) -> DataNode:
        """The images, decoded by the GPU with smooth upsampling, as CPU decoders have it."""
        fancy = {"jpeg_fancy_upsampling": True}
        return fn.decoders.image(encoded, device="mixed", **_LIKE_PIL, **fancy, **self._reservations())

    def decode_part(self, encoded: DataNode, part: DataNode) -> DataNode:
        """The `part` of each image, from start to end, decoded by the CPU."""
        images = fn.decoders.image_slice(encoded, start=part[0], end=part[1], axes=[0, 1], **_LIKE_PIL)
        return images.gpu() if self.device == "gpu" else images

    def crop(self, images: DataNode, box: DataNode) -> DataNode:
        """One view, resized as PIL does; `box` is the crop's start and end in `images`."""
        return fn.resize(
            # Sliced first: with roi_start and roi_end the filter reads pixels outside the box, PIL's not.
            fn.slice(images, start=box[0], end=box[1], axes=[0, 1]),
            size=[self.image_size, self.image_size],
            interp_type=types.INTERP_CUBIC,
            antialias=True,
        )

    def _takes(self, name: str) -> bool:
        """Whether the graph uses this field of `Fed`; DALI warns of inputs without a use."""
        uses = {
            "part_N22": self.decoder == "cpu",
            "boxes_NV22": self.makes_views,
            "numbers_NVD": self.distorts,
        }
        return uses.get(name, True)

    def crop_parts(self, parts: TensorListCPU, fed: Fed) -> np.ndarray:
        """uint8 (V, N, H, W, C): both crops in the decoded `parts` of the images in `fed`, PIL's pixels."""
        height_N, width_N = (fed.part_N22[:, 1] - fed.part_N22[:, 0]).astype(np.int64).T
        num_bytes_N = 3 * height_N * width_N
        end_N = np.cumsum(num_bytes_N)
        start_VN2, end_VN2 = fed.boxes_NV22.transpose(2, 1, 0, 3)
        views_VNHWC = np.empty((*start_VN2.shape[:2], self.image_size, self.image_size, 3), np.uint8)
        status_N = decode_and_crop(
            np.asarray(parts.as_reshaped_tensor([int(end_N[-1])])),  # a view: they lie one after another
            end_N - num_bytes_N,
            num_bytes_N,
            height_N,
            width_N,
            np.ones(len(end_N), np.bool_),
            np.concatenate([start_VN2, end_VN2 - start_VN2], axis=2),
            views_VNHWC,
            self.num_threads,
        )
        assert not status_N.any()
        return views_VNHWC

    def _reservations(self) -> dict[str, float]:
        """Settings of the GPU's decoders with which they need not allocate memory in mid-epoch."""
        height, width = self.largest_HW
        needed = _BYTES_PER_PIXEL * height * width
        return {
            "hw_decoder_load": self.hardware_share,
            "preallocate_height_hint": height,
            "preallocate_width_hint": width,
            "device_memory_padding": self.reserved or max(needed, _DEVICE_MEMORY),
            "host_memory_padding": self.reserved or max(needed, _HOST_MEMORY),
        }


@pipeline_def(enable_conditionals=True)
def _outputs(graph: Graph, feed: Callable[[], list], names: list[str]) -> tuple[DataNode, ...]:
    inputs = _inputs(feed, names)
    if graph.decoder == "gpu":
        images = graph.decode_whole(inputs["encoded"])
    else:
        images = graph.decode_part(inputs["encoded"], inputs["part_N22"])
    outputs = [images]
    if graph.makes_views:
        outputs = [graph.crop(images, inputs["boxes_NV22"][v]) for v in range(NUM_VIEWS)]
    if graph.distorts:
        outputs = [distort(outputs[v], inputs["numbers_NVD"][v]) for v in range(NUM_VIEWS)]
    return tuple(outputs)


@do_not_convert
def _inputs(feed: Callable[[], list], names: list[str]) -> dict[str, DataNode]:
    kinds, ranks = zip(*(INPUTS[name] for name in names), strict=True)
    nodes = fn.external_source(
        source=feed, num_outputs=len(names), dtype=list(kinds), ndim=list(ranks), no_copy=True
    )
    return dict(zip(names, nodes, strict=True))


def reason(error: RuntimeError) -> str:
    """What DALI says is wrong, in one line."""
    return str(error).split("encountered:")[-1].strip().partition("\n")[0]
