"""However a loader ends, nothing keeps running, and the training loop hears of it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipelines.batch import Loader
from pipelines.config import DataConfig
from pipelines.errors import DataError
from pipelines.loaders import LOADERS, build_loader

ROOT = Path(__file__).resolve().parents[1]
REAL = [name for name in LOADERS if name != "synthetic"]


def build(path: Path, name: str, **settings: object) -> Loader:
    config = DataConfig(**{"path": path, "loader": name, "image_size": 48, "workers": 2, **settings})
    return build_loader(config, seed=5, batch_size=8)


@pytest.mark.timeout(180)
def test_worker_that_is_killed_ends_the_epoch(beton, monkeypatch):
    monkeypatch.setattr("pipelines.sample_reader.read_image", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    loader = build(beton, "folder", workers=1)
    with pytest.raises(
        DataError, match=r"A worker process [^\n]* ended unexpectedly[^\n]*data\.workers[^\n]*\.$"
    ):
        list(loader.epoch(0))
    loader.close()


@pytest.mark.parametrize("name", REAL)
def test_close_in_mid_epoch_leaves_nothing_running(name, beton):
    process = psutil.Process()

    def load_one_and_close() -> None:
        loader = build(beton, name, prefetch=1)
        next(loader.epoch(0))
        loader.close()
        loader.close()

    load_one_and_close()  # libraries keep some threads from their first use on
    time.sleep(0.5)  # the kernel removes a thread a little after it was joined
    before = set(threading.enumerate()), {child.pid for child in process.children(recursive=True)}
    num_threads = process.num_threads()
    load_one_and_close()
    after = set(threading.enumerate()), {child.pid for child in process.children(recursive=True)}
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    deadline = time.monotonic() + 20
    while process.num_threads() > num_threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.num_threads() <= num_threads


@pytest.mark.timeout(300)
def test_process_can_exit_in_mid_epoch(beton):
    """All loaders at once, none closed; and none of their libraries loads before it is asked for."""
    script = f"""
import sys
from pipelines.config import DataConfig
from pipelines.loaders import build_loader
import torch
assert not {{"ffcv", "numba", "nvidia.dali"}} & set(sys.modules)
torch.set_num_threads(2)
loaders = [
    build_loader(DataConfig(path="{beton}", loader=name, workers=1, image_size=32), seed=0, batch_size=4)
    for name in {REAL}
]
epochs = [loader.epoch(0) for loader in loaders]
for epoch in epochs:
    next(epoch)
assert torch.get_num_threads() == 2
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=250
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr


ENDLESS = """
import logging, sys, time
from pathlib import Path
from pipelines.config import DataConfig
from pipelines.loaders import build_loader
if __name__ == "__main__":
    config = DataConfig(path=Path(sys.argv[1]), loader=sys.argv[2], workers=2, image_size=32)
    loader = build_loader(config, seed=0, batch_size=4)
    try:
        while True:
            for batch in loader.epoch():
                print(batch.indices_N.tolist(), flush=True)
                time.sleep(0.05)
    finally:
        loader.close()
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signal_leaves_no_process_behind(name, signum, beton, tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    command = [sys.executable, str(tmp_path / "endless.py"), str(beton), name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        for _ in range(8):  # into the second epoch
            assert run.stdout.readline()
        children = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signum)
        assert run.wait(timeout=100) != 0
        _, alive = psutil.wait_procs(children, timeout=100)
        assert not alive
