"""Which evaluations accompany a run: those that its config asks for, as far as the dataset has labels."""

import logging

from eval.online import MIN_IMAGES, OnlineKnn
from model.twin import Twin
from model.weights import Normalisation
from pipelines.source import open_source
from train.config import RunConfig
from train.distributed import World
from train.probe import OnlineProbe

_log = logging.getLogger(__name__)


def open_online_evaluation(
    config: RunConfig, twin: Twin, world: World
) -> tuple[OnlineProbe | None, OnlineKnn | None]:
    """The probe and the kNN of a run; None for what there is not, and the log says why where labels lack.

    Synthetic data have none that mean anything. Raises `DataError` for a dataset that cannot be opened, or
    whose classes are not those of the other one.
    """
    online = config.eval.online
    if config.data.loader == "synthetic" or not (online.probe or online.knn_every_epochs):
        return None, None
    train = open_source(config.data.path)
    if not train.classes:
        if world.is_main:
            _log.warning("%s has no labels, so nothing is evaluated during training.", train.path)
        return None, None
    probe = knn = None
    if online.probe:
        width = twin.backbone.feature_dim
        probe = OnlineProbe(width, len(train.classes), online.probe_lr, world.device)
    if online.knn_every_epochs and len(train) >= MIN_IMAGES:
        test = None if online.test_path is None else open_source(online.test_path)
        augment = config.data.augment
        knn = OnlineKnn(train, test, config.eval, Normalisation(augment.mean, augment.std))
    return probe, knn
