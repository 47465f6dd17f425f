"""Fixtures that several test files share."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

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


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's commands on PATH, played by `tests/ranks/fake_slurm.py`; gives the folder of its notes."""
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun", "scontrol", "squeue"):
        (tmp_path / "bin" / name).symlink_to(Path(__file__).parent / "ranks" / "fake_slurm.py")
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "notes"))
    return tmp_path / "notes"


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where this process can run Triton kernels: a CUDA device, or the CPU in a child of `run_interpreted`.

    Tests that use it are marked `gpu`, and run in both places; elsewhere they skip.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; Triton's interpreter runs this test in a child process")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def run_interpreted() -> Callable[[str], None]:
    """Run a test file's `gpu` tests on the CPU, in Triton's interpreter; fails with their output if one does.

    In a child process, because the interpreter is chosen when Triton is imported.
    """

    def run(test_file: str) -> None:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", test_file]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["OMP_NUM_THREADS"] = "1"
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr

    return run


@pytest.fixture(scope="session")
def compile_for() -> Callable[..., None]:
    """Compile one launch of a Triton kernel for a compute capability; needs no GPU.

    With what Triton learns from its arguments: types, constants, alignment. Fails, too, where a block needs
    more shared memory than some GPU of that generation has.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
    types[torch.int64] = "i64"

    def compile_launch(capability: int, kernel: "triton.JITFunction", args: tuple, options: dict) -> None:
        signature, constants, attributes = {}, {}, {}
        for place, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
            specialised = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (specialised and type(value) is int and value == 1):
                signature[parameter.name], constants[(place,)] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[parameter.name], aligned = "*" + types[value.dtype], True
            else:
                signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
                aligned = specialised and isinstance(value, int) and value % 16 == 0
            if aligned:
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=options)
        assert compiled.asm["cubin"]
        # The least that a GPU of this generation has: 64 KiB on sm_75, 99 KiB on sm_86, sm_89 and sm_120.
        assert compiled.metadata.shared <= (64 if capability < 80 else 99) * 1024

    return compile_launch


@pytest.fixture(scope="session")
def check_figures() -> Callable[[dict, int], None]:
    """Fails unless a benchmark's result becomes lines of the table of all benchmarks, with all its turns."""
    from tools.bench.figures import figures_of

    def check(result: dict, repeats: int) -> None:
        figures = figures_of(result)
        assert {figure.bench for figure in figures} == {result["bench"]}
        assert all(len(figure.values) == repeats and min(figure.values) > 0 for figure in figures)
        assert len({figure.case for figure in figures}) == len(figures) >= len(result["rows"])
        compared = [figure.ratio for figure in figures if figure.ratio_to]
        assert len(compared) >= 2
        assert any(ratio == pytest.approx(1) for ratio in compared)  # what the others are compared with

    return check


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., torch.nn.Module]:
    """Save a checkpoint of a twin with random weights and batch-norm statistics; returns the twin.

    `sections` are those of `RunConfig`: `write_checkpoint(path, model={"backbone": "resnet18"})`.
    """
    from model.twin import Twin
    from train.checkpoint import save_checkpoint
    from train.config import RunConfig

    def write(path: Path, **sections: dict) -> torch.nn.Module:
        model = {"projector": "8-8", **sections.pop("model", {})}
        data = {"path": "images", **sections.pop("data", {})}
        config = RunConfig.model_validate({"run_dir": path.parent, "data": data, "model": model, **sections})
        torch.manual_seed(0)
        twin = Twin(config.model)
        for module in twin.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(std=0.1)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
        state = {"config": config.model_dump(mode="json"), "model": twin.state_dict()}
        save_checkpoint({**state, "optimizer": {}, "scaler": {}, "step": 0, "num_samples": 1}, path)
        return twin

    return write


@pytest.fixture(scope="session")
def write_images() -> Callable[..., None]:
    """Draw `per_class` JPEGs of varied sizes in one sub-folder per class: noise around a grey of its own."""

    def write(folder: Path, classes: list[str], per_class: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        for label, name in enumerate(classes):
            (folder / name).mkdir(parents=True)
            for i in range(per_class):
                height, width = random.integers(20, 60, 2)
                grey = 255 * (label + 1) / (len(classes) + 1)
                pixels_HWC = random.normal(grey, 10, (height, width, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels_HWC).save(folder / name / f"{i}.jpg", quality=95)

    return write


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 JPEGs in three classes: smooth with some noise, sides of 40 to 320 pixels, one grayscale."""
    root = tmp_path_factory.mktemp("data") / "images"
    rng = np.random.default_rng(7)
    for number in range(24):
        size = tuple(int(side) for side in rng.integers(40, 320, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
        noise = rng.normal(0, 6, (size[1], size[0], 3))
        image = Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))
        path = root / ("ant", "bee", "cat")[number % 3] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.convert("L" if number == 5 else "RGB").save(path, quality=92)
    return root


@pytest.fixture(scope="session")
def beton(image_folder: Path) -> Path:
    """The same images as FFCV's own writer stores them."""
    threads = torch.get_num_threads()
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    path = image_folder.parent / "images.beton"
    images = ImageFolder(image_folder, transform=np.asarray)
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=92), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(images)
    torch.set_num_threads(threads)  # FFCV changes it when it is imported
    return path
