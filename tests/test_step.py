"""The step makes the host wait for nothing, can take its batch in pieces, and be compiled or recorded."""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.loss.reference import reference_loss
from model.norm import TwinBatchNorm
from pipelines.augment import distort
from pipelines.augment.normalise import normalise
from pipelines.batch import Batch
from pipelines.loaders import build_loader
from train.config import RunConfig
from train.errors import ConfigError
from train.graph import WARM_UP_STEPS, StepGraph
from train.loop import build_twin
from train.step import DTYPES, PHASES, TrainStep, _pieces

ROWS, SIZE = 12, 18
STEP = 3  # a step with a learning rate; that of step 0 is 0
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Pair(nn.Module):
    """A small network for both views, which computes in the dtype of its weights."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 5, stride=3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(150, 9)
        )

    def forward(self, views_VNCHW: Tensor) -> tuple[Tensor, Tensor]:
        z_a_ND, z_b_ND = (self.layers(view.to(self.layers[0].weight.dtype)) for view in views_VNCHW)
        return z_a_ND, z_b_ND


def configure(**train: object) -> RunConfig:
    optim = {"lr_weights": 9, "lr_biases": 1, "warmup_epochs": 1}
    data = {"path": "none", "loader": "synthetic", "image_size": SIZE}
    train = {"batch_size": ROWS, "precision": "fp32", "epochs": 20, "optim": optim, **train}
    return RunConfig.model_validate({"run_dir": "none", "data": data, "train": train})


def make_batches(config: RunConfig, count: int, device: str = "cpu") -> list[Batch]:
    loader = build_loader(
        config.data, seed=5, batch_size=config.train.batch_size, device=torch.device(device)
    )
    found = list(islice(loader.epoch(0), count))
    loader.close()
    return found


def make_step(config: RunConfig, has_norm: bool = False, device: str = "cpu", **options: object) -> TrainStep:
    torch.manual_seed(8)
    network = Pair(nn.BatchNorm2d(6) if has_norm else nn.Identity()).double()
    return TrainStep(config, network.to(device), steps_per_epoch=1, **options)


def definition(config: RunConfig, network: nn.Module, batch: Batch, pieces: int) -> Tensor:
    """The loss of the batch after a plain pass of each piece through `network`; all keep their graph."""
    views_VNCHW = distort(
        batch.views_VNHWC, batch.params, config.data.augment, DTYPES[config.train.precision]
    )
    embeddings = [network(views_VNCHW[:, start::pieces]) for start in range(pieces)]
    return reference_loss(*(torch.cat(z) for z in zip(*embeddings, strict=True)), config.model.loss)[0]


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(
    "precision", ["fp64", "fp32", "fp16"]
)  # weights of 64 bits are out of autocast's reach
@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_gradient_is_that_of_the_whole_batch(pieces: int, precision: str, has_norm: bool) -> None:
    """With batch-norm: of the whole batch's loss, where each piece has statistics of its own."""
    config = configure(micro_batches=pieces, precision=precision)
    (batch,) = make_batches(config, 1)
    step = make_step(config, has_norm)
    plain = copy.deepcopy(step.network)
    total = definition(config, plain, batch, pieces if has_norm else 1)
    total.backward()
    assert all(plain.layers[layer].weight.grad.abs().max() > 1e-3 for layer in (0, 4))

    loss = step(batch, STEP)
    assert step.scaler.is_enabled() == (precision == "fp16")
    torch.testing.assert_close(loss.total, total.detach(), rtol=1e-10, atol=0)
    for p, reference in zip(step.network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, reference.grad, rtol=1e-10, atol=1e-12)
    # Running statistics advance once for each piece and view, not twice.
    torch.testing.assert_close(dict(step.network.named_buffers()), dict(plain.named_buffers()))
    if has_norm:
        assert step.network.layers[1].num_batches_tracked == 2 * pieces


@pytest.mark.parametrize("norm", ["twin", "torch"])
def test_fp64_is_fp64_from_the_weights_of_fp32_to_the_momenta(norm: str) -> None:
    """Nothing on the way is rounded to less: the loss differs from that of fp32 by what fp32 rounds."""
    losses = []
    for precision, dtype in (("fp64", torch.float64), ("fp32", torch.float32)):
        config = configure(precision=precision)
        model = config.model.model_copy(update={"backbone": "resnet18", "projector": "7-6", "norm": norm})
        config = config.model_copy(update={"model": model})
        twin = build_twin(config, torch.device("cpu"))
        start = copy.deepcopy(twin.state_dict())
        step = TrainStep(config, twin, steps_per_epoch=1, keep_features=True)
        (batch,) = make_batches(config, 1)
        loss = step(batch, STEP)
        momenta = [state["mu"] for state in step.optimizer.state.values()]
        gradients = [p.grad for p in twin.parameters()]
        state = [t for t in twin.state_dict().values() if t.is_floating_point()]
        assert {t.dtype for t in (*loss, *momenta, *gradients, *state, step.features_NF)} == {dtype}
        losses.append((start, loss.total.item()))
    (start, loss), (start_fp32, loss_fp32) = losses
    assert all(torch.equal(start[name], value.to(start[name].dtype)) for name, value in start_fp32.items())
    assert loss != loss_fp32 and loss == pytest.approx(loss_fp32, rel=1e-4)


def test_pieces_on_two_ranks_give_the_gradient_of_the_global_batch(run_ranks, tmp_path) -> None:
    """With synchronised batch-norm too: a piece holds the same samples on any number of ranks."""
    (batch,) = make_batches(configure(), 1)
    cases = [
        (config, make_step(config, has_norm).network)
        for config in (configure(micro_batches=pieces) for pieces in (1, 2, 3))
        for has_norm in (False, True)
    ]
    torch.save((batch, STEP, cases), tmp_path / "given.pt")
    run_ranks(2, "step.py", tmp_path)
    for number, (config, network) in enumerate(cases):
        definition(config, network, batch, config.train.micro_batches).backward()
        for rank in range(2):
            gradients, buffers = torch.load(tmp_path / f"{number}-{rank}.pt")
            expected = [p.grad for p in network.parameters()]
            torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(buffers, list(network.buffers()))


def test_one_piece_is_the_batch_itself_and_each_of_several_can_join_its_views() -> None:
    views_VNCHW = torch.randn(2, 6, 5, 4, 3).permute(0, 1, 4, 2, 3)
    (whole,) = _pieces(views_VNCHW, 1)
    assert (whole.data_ptr(), whole.stride()) == (views_VNCHW.data_ptr(), views_VNCHW.stride())
    for start, piece in enumerate(_pieces(views_VNCHW, 3)):
        assert torch.equal(piece, views_VNCHW[:, start::3])
        assert piece.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert piece.flatten(0, 1).data_ptr() == piece.data_ptr()


class NoWaiting(TorchDispatchMode):
    """Refuses the operations for which the host would wait for an accelerator."""

    WAITING = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        assert name not in self.WAITING and not name.startswith("_unique"), func
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_step_reads_no_value_on_the_host(
    precision: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the distortions, whose torch implementation counts what it finds; the Triton one does not."""
    monkeypatch.setattr("train.step.distort", lambda views, _, *options: normalise(views, *options))
    config = configure(micro_batches=pieces, precision=precision)
    first, second = make_batches(config, 2)
    step = make_step(config, has_norm=True)
    step(first, STEP)

    def refuse(*_: object) -> None:
        raise AssertionError("a value was read on the host")

    for method in ("tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, method, refuse)
    with NoWaiting():
        loss = step(second, STEP + 1)
    monkeypatch.undo()
    assert loss.total.isfinite()


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_non_finite_step_changes_nothing(broken: str, precision: str, pieces: int) -> None:
    """Weights, momenta, running statistics; such steps in a row are counted until one is sound."""
    config = configure(micro_batches=pieces, precision=precision)
    step = make_step(config, has_norm=True)
    batches = make_batches(config, 5)
    step(batches[0], STEP)

    def state() -> list[Tensor]:
        momenta = [of["mu"] for of in step.optimizer.state.values()]
        tensors = [*step.network.parameters(), *step.network.buffers(), *momenta]
        return [tensor.detach().clone() for tensor in tensors if tensor.is_floating_point()]

    before, counts = state(), [step.skipped_in_row.item()]
    weight = step.network.layers[0].weight
    for number in (1, 2):
        with broken_step(weight, broken):
            loss = step(batches[number], STEP + number)
        assert loss.total.isfinite() == (broken == "gradient")
        assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
        counts.append(step.skipped_in_row.item())
    step(batches[3], STEP + 3)
    assert all(not torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert [*counts, step.skipped_in_row.item()] == [0, 1, 2, 0]
    if precision == "fp16":
        assert step.scaler.get_scale() == 2.0**16 / 4


@contextmanager
def broken_step(weight: nn.Parameter, what: str) -> Iterator[None]:
    """Within the block one number of the weight, or of the gradient that reaches it, is not finite."""
    good = weight.detach().clone()
    hook = weight.register_hook(lambda grad: grad + float("inf")) if what == "gradient" else None
    if what == "loss":
        weight.data[0, 0, 0, 0] = float("nan")
    try:
        yield
    finally:
        weight.data.copy_(good)
        if hook is not None:
            hook.remove()


def test_the_guard_against_waiting_sees_it() -> None:
    with NoWaiting():
        for wait in (lambda x: x.sum().item(), lambda x: bool(x.sum()), lambda x: x[x > 0], torch.nonzero):
            with pytest.raises(AssertionError):
                wait(torch.ones(3))


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)
def test_compiled_step_gives_the_same_weights() -> None:
    """In pieces, which takes the network through every mode: without and with gradients, twice in a step."""
    config = configure(micro_batches=2)
    batches = make_batches(config, 3)
    plain, compiled = (make_step(c, True) for c in (config, configure(micro_batches=2, compile=True)))
    for number, batch in enumerate(batches):
        for step in (plain, compiled):
            step(batch, STEP + number)
    start = make_step(config, True).network.state_dict()
    assert compiled.network.state_dict().keys() == start.keys()
    assert any(not torch.equal(compiled.network.state_dict()[key], start[key]) for key in start)
    torch.testing.assert_close(
        compiled.network.state_dict(), plain.network.state_dict(), rtol=1e-9, atol=1e-12
    )


class Widening(nn.Module):
    """A batch-norm before each layer, which all differ in width."""

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm, self.linear = TwinBatchNorm(width), nn.Linear(width, width + 1)

        def forward(self, x_NF: Tensor) -> Tensor:
            return self.linear(self.norm(x_NF))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(self.Layer(width) for width in range(3, 8)))

    def forward(self, views_VNCHW: Tensor) -> tuple[Tensor, Tensor]:
        z_a_ND, z_b_ND = (self.layers(view.mean((2, 3))) for view in views_VNCHW)
        return z_a_ND, z_b_ND


def test_every_variant_of_a_layer_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five widths, with and without gradients: torch's own limit is eight."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch.compiler.config, "recompile_limit", torch.compiler.config.recompile_limit)
    monkeypatch.setattr("train.step.shutil.which", lambda name: name)
    config = configure(micro_batches=2, compile=True)
    step = TrainStep(config, Widening(), steps_per_epoch=1)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        loss = step(make_batches(config, 1)[0], STEP)
    assert loss.total.isfinite()


def test_settings_that_cannot_work_are_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for pieces in (5, 12):
        with pytest.raises(ValidationError, match="micro_batches must divide batch_size into pieces of at"):
            configure(micro_batches=pieces)
    with pytest.raises(ValidationError, match="cuda_graph needs a GPU, but device is cpu"):
        configure(cuda_graph=True, device="cpu")
    with pytest.raises(ValidationError, match="precision fp64 is for the CPU, but device is cuda"):
        configure(precision="fp64", device="cuda")
    with pytest.raises(ConfigError, match=r"train\.precision fp64 is for the CPU, but this run is on a GPU"):
        make_step(configure(precision="fp64"), device="meta")
    with pytest.raises(ConfigError, match=r"train\.cuda_graph needs one GPU, but this run is on the CPU"):
        make_step(configure(cuda_graph=True))
    small = RunConfig.model_validate(
        {"run_dir": "none", "data": {"path": "none", "image_size": 16}, "train": {"precision": "bf16"}}
    )
    with pytest.raises(
        ConfigError, match=r"In bf16 on the CPU oneDNN computes wrong gradients for views of 16"
    ):
        make_step(small)
    monkeypatch.setattr("train.step.world_size", lambda: 4)
    with pytest.raises(ConfigError, match="must divide the 3 samples of each rank, but it is 2"):
        make_step(configure(micro_batches=2))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"needs the C\+\+ compiler no-such-compiler"):
        make_step(configure(compile=True))


class Streams:
    """In place of torch's CUDA streams: notes the order in which they are made and wait for each other."""

    def __init__(self) -> None:
        self.made: list[Streams.Stream] = []
        self.waits: list[tuple[int, int]] = []

    def new(self) -> "Streams.Stream":
        self.made.append(self.Stream(self, len(self.made)))
        return self.made[-1]

    class Stream:
        def __init__(self, streams: "Streams", number: int) -> None:
            self.streams, self.number = streams, number

        def wait_stream(self, other: "Streams.Stream") -> None:
            self.streams.waits.append((self.number, other.number))


def test_steps_before_the_recording_share_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory serves all of them, and each begins after what the consumer has queued since the last."""
    streams = Streams()
    current = streams.new()
    monkeypatch.setattr(torch.cuda, "Stream", streams.new)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    graph = StepGraph(lambda views, params: views + 1)
    for _ in range(WARM_UP_STEPS):
        assert graph(torch.zeros(2), None).sum() == 2
    assert streams.waits == [(1, 0), (0, 1)] * WARM_UP_STEPS


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


GPU_CASES = [("fp32", 1), ("bf16", 1), ("fp16", 1), ("fp32", 3), ("fp16", 3)]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("precision", "pieces"), GPU_CASES)
def test_recorded_step_gives_the_weights_of_the_plain_one(precision: str, pieces: int) -> None:
    """Over several replays with other batches and rates, and without a wait in any of them."""
    count = WARM_UP_STEPS + 4
    config = configure(micro_batches=pieces, precision=precision)
    recorded_config = configure(micro_batches=pieces, precision=precision, cuda_graph=True)
    batches = make_batches(config, count, "cuda")
    marks: list[str] = []
    plain = make_step(config, True, "cuda")
    recorded = make_step(recorded_config, True, "cuda", mark=marks.append)
    for number, batch in enumerate(batches):
        expected = plain(batch, STEP + number)
        with waiting_is_an_error() if number > WARM_UP_STEPS else nullcontext():
            loss = recorded(batch, STEP + number)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert marks == [*PHASES * WARM_UP_STEPS, *["step"] * (count - WARM_UP_STEPS)]
    torch.testing.assert_close(
        recorded.network.state_dict(), plain.network.state_dict(), rtol=1e-6, atol=1e-9
    )
    torch.testing.assert_close(recorded.scaler.state_dict(), plain.scaler.state_dict())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("precision", "pieces"), GPU_CASES)
def test_plain_step_on_a_gpu_never_waits(precision: str, pieces: int) -> None:
    config = configure(micro_batches=pieces, precision=precision)
    step = make_step(config, True, "cuda")
    for number, batch in enumerate(make_batches(config, 4, "cuda")):
        with waiting_is_an_error() if number > 1 else nullcontext():
            loss = step(batch, STEP + number)
    assert loss.total.isfinite()


@pytest.mark.gpu
@needs_gpu
def test_compiled_and_recorded_step_on_a_gpu_gives_the_same_weights() -> None:
    config = configure()
    plain = make_step(config, True, "cuda")
    both = make_step(configure(compile=True, cuda_graph=True), True, "cuda")
    for number, batch in enumerate(make_batches(config, WARM_UP_STEPS + 3, "cuda")):
        for step in (plain, both):
            step(batch, STEP + number)
    torch.testing.assert_close(both.network.state_dict(), plain.network.state_dict(), rtol=1e-6, atol=1e-9)
