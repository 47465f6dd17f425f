"""What each part of a run could do alone on this machine, in pairs of views per second of one rank."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipelines.batch import NUM_VIEWS, Batch
from pipelines.epoch_loader import LoaderJob
from pipelines.errors import DataError
from pipelines.source import open_source
from tools.bench.loader_measure import Setting, measure
from tools.bench.loader_usage import cpu_seconds
from tools.bench.timing import seconds_for
from tools.profile.reading import measure_reading
from train.config import RunConfig
from train.distributed import World

STAGE_SECONDS = 1.0  # that each stage is measured, and the loader at least


def loader_job(config: RunConfig, world: World) -> LoaderJob:
    return LoaderJob(config.data, config.seed, config.train.batch_size, world.rank, world.size, world.device)


def stage_ceilings(config: RunConfig, world: World) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The stages of loading, one after the other, and what the images are like.

    read     see `measure_reading`
    decode   libjpeg-turbo, once for both views  } on data.workers threads, from memory
    crop     both views, bicubic                 }
    augment  on the device
    copy     both views' pixels to the GPU, if there is one

    Where the images are not JPEG files, there are fewer; without a dataset, none. Raises `DataError` where
    the dataset cannot be read.
    """
    if config.data.loader == "synthetic":
        return {}, None
    job = loader_job(config, world)
    read = measure_reading(job, STAGE_SECONDS)
    ceilings = {} if read is None else {"read": read}
    source = open_source(config.data.path)
    images = {"path": str(source.path), "images": len(source)}
    if source.holds_raw:
        return ceilings, images
    from tools.bench.loader_stages import draw_sample, stages  # which need libturbojpeg

    try:
        sample = draw_sample(source)
    except DataError:  # files of another kind
        return ceilings, images
    shapes_M2 = np.array([image.shape[:2] for image in sample.images])
    images |= {
        "mean_bytes": float(np.mean([jpeg.nbytes for jpeg in sample.jpegs])),
        "mean_pixels": float(shapes_M2.prod(axis=1).mean()),
        "mean_longer_side": float(shapes_M2.max(axis=1).mean()),
    }
    setting = Setting(
        config.data.image_size,
        job.batch_per_rank,
        max(1, config.data.workers),
        world.device,
        config.data.augment,
    )
    for stage in stages(sample, setting):
        world.gather(None)  # all ranks share this machine's cores in the same stage
        turn = measure(stage, STAGE_SECONDS, world.device)
        ceilings[stage.name] = {"pairs_per_second": turn.pairs_per_second, "cores_used": turn.cores}
    if "copy" in ceilings:
        pair_bytes = NUM_VIEWS * 3 * config.data.image_size**2
        ceilings["copy"]["bytes_per_second"] = pair_bytes * ceilings["copy"]["pairs_per_second"]
    return ceilings, images


def loader_ceiling(stream: Iterator[Batch], steps: int, batch: int, device: torch.device) -> dict[str, float]:
    """The loader as a whole: `steps` batches of `batch` pairs, and as many again while that is too quick.

    The stream must have been warmed up.
    """
    cpu, seconds, turns = cpu_seconds(), 0.0, 0
    while seconds < STAGE_SECONDS:
        seconds += seconds_for(stream, steps, device)
        turns += 1
    cores = (cpu_seconds() - cpu) / seconds
    return {"pairs_per_second": turns * steps * batch / seconds, "cores_used": cores}
