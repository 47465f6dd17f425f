"""A loader's position can be saved and taken up again, and one epoch runs on into the next."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch

from pipelines.batch import Batch, Loader
from pipelines.config import DataConfig
from pipelines.epoch_loader import LoaderJob, Task
from pipelines.errors import DataError
from pipelines.loaders import LOADERS, build_loader

REAL = [name for name in LOADERS if name != "synthetic"]
STEPS = 4  # an epoch: 24 images in batches of 6


def build(path: Path, name: str, *, seed: int = 3, batch: int = 6, rank: int = 0, world: int = 1, **settings):
    config = DataConfig(**{"path": path, "loader": name, "image_size": 32, "workers": 2, **settings})
    return build_loader(config, seed=seed, batch_size=batch, rank=rank, world_size=world)


@pytest.fixture(scope="module", params=REAL)
def loader(request: pytest.FixtureRequest, beton: Path) -> Iterator[Loader]:
    with closing(build(beton, request.param)) as loader:
        yield loader


def take(loader: Loader, count: int) -> list[Batch]:
    """The next `count` batches, from epoch to epoch."""
    batches: list[Batch] = []
    while len(batches) < count:
        for batch in loader.epoch():
            batches.append(batch)
            if len(batches) == count:
                break
    return batches


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.indices_N, b.indices_N)
        assert torch.equal(a.params.box_VN4, b.params.box_VN4)
        assert torch.equal(a.views_VNHWC, b.views_VNHWC)


def start(loader: Loader, epoch: int = 0, step: int = 0) -> None:
    loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "step": step})


@pytest.mark.parametrize("done", [0, 1, 3, STEPS, 2 * STEPS - 1])
def test_saved_position_goes_on_with_the_very_next_batch(loader: Loader, beton: Path, done: int) -> None:
    start(loader)
    whole = take(loader, 3 * STEPS)
    start(loader)
    take(loader, done)
    state = loader.state_dict()
    assert (state["epoch"], state["step"]) == divmod(done, STEPS)
    take(loader, 2)  # what comes later changes nothing that was saved
    name = next(name for name in REAL if type(loader).__name__.lower().startswith(name))
    with closing(build(beton, name)) as other:
        other.load_state_dict(state)
        assert_equal(take(other, 3 * STEPS - done), whole[done:])


def test_position_holds_for_another_number_of_ranks(beton: Path) -> None:
    with closing(build(beton, "folder", workers=0)) as one:
        take(one, 5)
        state = one.state_dict()
        expected = take(one, 3)
    halves = []
    for rank in range(2):
        with closing(build(beton, "folder", workers=0, rank=rank, world=2)) as loader:
            loader.load_state_dict(state)
            halves.append(take(loader, 3))
    for whole, *parts in zip(expected, *halves, strict=True):
        assert torch.equal(torch.cat([part.views_VNHWC for part in parts], 1), whole.views_VNHWC)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"seed": 4}, "seed 3, but now it is 4"), ({"batch": 8}, "batch_size 6, but now it is 8")],
)
def test_position_of_another_run_is_refused(beton: Path, change: dict[str, int], reason: str) -> None:
    with closing(build(beton, "folder")) as one, closing(build(beton, "folder", **change)) as other:
        state = one.state_dict()
        with pytest.raises(DataError, match=reason):
            other.load_state_dict(state)


def test_epoch_without_arguments_goes_on_from_epoch_to_epoch(loader: Loader) -> None:
    start(loader, epoch=1, step=2)
    rest, whole = list(loader.epoch()), list(loader.epoch())
    assert (len(rest), len(whole)) == (STEPS - 2, STEPS)
    assert_equal(rest, list(loader.epoch(1, 2)))
    assert_equal(whole, list(loader.epoch(2)))


@pytest.mark.parametrize("name", REAL)
def test_next_epoch_loads_while_the_last_batch_is_trained_on(
    name: str, beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, int]] = []
    tasks_of = LoaderJob.tasks

    def record(*args: object) -> Iterator[Task]:
        for task in tasks_of(*args):
            begun.append((task.epoch, task.step))
            yield task

    monkeypatch.setattr(LoaderJob, "tasks", record)
    with closing(build(beton, name, prefetch=2)) as loader:
        running = loader.epoch(0)
        for _ in range(STEPS):  # nobody asks for more than an epoch's last batch
            next(running)
        deadline = time.monotonic() + 20
        while (1, 0) not in begun and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (1, 0) in begun
        for epoch in (1, 2):
            list(loader.epoch(epoch))
        assert begun == sorted(set(begun))  # one stream: no batch was made twice or thrown away
        list(loader.epoch(0, 1))
        assert begun.count((0, 1)) == 2  # another place: a new stream


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", REAL)
def test_memory_stays_flat_over_20_epochs(name: str, beton: Path) -> None:
    """An epoch is 3.7 MB of pixels: 15 epochs of leaked batches would be 55 MB."""
    process = psutil.Process()

    def resident() -> float:
        family = [process, *process.children(recursive=True)]
        return sum(member.memory_info().rss for member in family) / 1e6

    with closing(build(beton, name, image_size=160, prefetch=1)) as loader:
        for epoch in range(20):
            for _ in loader.epoch(epoch):
                pass
            if epoch == 4:
                settled = resident()
        assert resident() - settled < 20
