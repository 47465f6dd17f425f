"""Fixtures that several test files share."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images, beside the checkout; tests that need it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no folder of real images beside the checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """Run `tests/ranks/<script>` as that many gloo processes; fails with their output if any fails."""
    tests = Path(__file__).parent

    def run(world_size: int, script: str, *arguments: object) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world_size}", str(tests / "ranks" / script), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parent)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stdout + result.stderr

    return run
