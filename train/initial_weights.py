"""Start a new run from trained weights: `train.initial_weights`."""

import logging

from model.twin import Twin
from model.twin_weights import start_from
from train.config import RunConfig
from train.distributed import World
from train.errors import TrainingError

_log = logging.getLogger(__name__)


def load_initial_weights(twin: Twin, config: RunConfig, world: World) -> None:
    """Give `twin` the weights of the file that `train.initial_weights` names; without one it stays as drawn.

    The file is a checkpoint of ours or of the authors, or a backbone alone, which leaves the projector as
    drawn. Momenta are not taken over, although the authors' could be, to the bit: a new run begins with a
    warm-up from a rate of zero, which would make them decay before they could act.

    Raises `ModelError` where the file cannot be read or does not fit, and `TrainingError` where the ranks
    read different files.
    """
    path = config.train.initial_weights
    if path is None:
        return
    weights = start_from(twin, config.model, path)
    fingerprint = [value.double().sum().item() for value in weights.state.values()]
    if any(other != fingerprint for other in world.gather(fingerprint)):
        raise TrainingError(
            f"The processes find different weights in train.initial_weights {path}; it must be the same file "
            f"on all machines."
        )
    if world.is_main and weights.projector is None:
        _log.warning("%s holds a backbone alone; the projector starts from random weights.", path)
