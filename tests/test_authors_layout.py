"""The authors' checkpoints and ours hold the same networks, there and back; theirs goes on from ours."""

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from model.backbones import BACKBONES, build_backbone
from model.errors import ModelError
from model.twin import Twin
from model.twin_weights import start_from
from model.weights import IMAGENET, load_backbone, read_weights
from pipelines.augment import distort
from pipelines.batch import Batch
from pipelines.loaders import build_loader
from tests.authors_algorithm import AuthorsLars, AuthorsRun, BarlowTwins, Wrapped
from tools.export import export_backbone, export_twin
from train.checkpoint import save_checkpoint
from train.config import RunConfig
from train.step import TrainStep

ROWS, IMAGES = 6, 14  # two steps in an epoch
STEP = 5  # of the third epoch


class DoubleTwin(Twin):
    def forward(self, views_VNCHW: Tensor, with_features: bool = False) -> tuple[Tensor, ...]:
        return super().forward(views_VNCHW.double(), with_features)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    optim = {"lr_weights": 8.0, "lr_biases": 0.2, "weight_decay": 1e-4}
    return RunConfig.model_validate(
        {
            "run_dir": "none",
            "data": {"path": "none", "loader": "synthetic", "image_size": 16},
            "model": {"backbone": "resnet18", "projector": "10-12-9"},
            "train": {"batch_size": ROWS, "precision": "fp32", "epochs": 20, "optim": optim},
        }
    )


@pytest.fixture(scope="module")
def batches(config: RunConfig) -> list[Batch]:
    loader = build_loader(config.data, seed=2, batch_size=ROWS, device=torch.device("cpu"))
    batches = [batch for batch, _ in zip(loader.epoch(0), range(2), strict=False)]
    loader.close()
    return batches


@pytest.fixture(scope="module")
def run(config: RunConfig, batches: list[Batch], tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Our training after a step in float64, and the checkpoint that was written then."""
    torch.manual_seed(4)
    twin = DoubleTwin(config.model).to(torch.float64, memory_format=torch.channels_last)
    step = TrainStep(config, twin, steps_per_epoch=IMAGES // ROWS)
    step(batches[0], STEP - 1)
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    state = {"config": config.model_dump(mode="json"), "model": twin.state_dict(), "scaler": {}}
    state |= {"optimizer": step.optimizer.state_dict(), "step": STEP, "num_samples": IMAGES}
    save_checkpoint(state, path)
    return step, path


def random_authors_model(backbone: str = "resnet18", widths: tuple[int, ...] = (10, 12, 9)) -> BarlowTwins:
    """With batch-norms that do something in evaluation mode."""
    model = BarlowTwins(backbone, widths)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def save_as_theirs(network: BarlowTwins, path: Path, **more: object) -> None:
    optimizer = AuthorsLars(network)
    state = {"epoch": 7, "model": Wrapped(network).state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | more, path)


def test_their_code_goes_on_from_our_export(
    run: tuple, batches: list[Batch], config: RunConfig, tmp_path: Path
) -> None:
    """Strictly loaded, optimiser included, its next step is ours."""
    step, path = run
    export_twin(path, tmp_path / "checkpoint.pth")
    theirs = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert theirs.keys() == {"epoch", "model", "optimizer"}
    assert theirs["epoch"] == 2
    assert all(value.is_contiguous() for value in theirs["model"].values())
    model = BarlowTwins("resnet18", (10, 12, 9)).double()
    assert list(theirs["model"]) == list(Wrapped(model).state_dict())
    Wrapped(model).load_state_dict(theirs["model"], strict=True)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(model.bn, name), getattr(BarlowTwins("resnet18", (9, 9)).bn, name))
    optimizer = AuthorsLars(model, weight_decay=0.5)
    optimizer.load_state_dict(theirs["optimizer"])
    assert all(group["weight_decay"] == 1e-4 for group in optimizer.param_groups)

    going_on = AuthorsRun(model, optimizer, ROWS, 20, IMAGES // ROWS, lr_weights=8.0, lr_biases=0.2)
    batch = batches[1]
    views = distort(batch.views_VNHWC, batch.params, config.data.augment, torch.float32).double()
    loss = going_on.train(views, STEP)
    assert step(batch, STEP).total.item() == pytest.approx(loss, rel=1e-10)
    for name, value in step.network.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["checkpoint.pth", "twin.safetensors"])
def test_our_weights_come_back_to_the_bit(run: tuple, config: RunConfig, tmp_path: Path, name: str) -> None:
    _, path = run
    out, again = tmp_path / name, tmp_path / f"again-{name}"
    export_twin(path, out)
    export_twin(out, again)
    expected = torch.load(path, weights_only=True)["model"]
    for file in (out, again):
        twin = Twin(config.model).double()
        weights = start_from(twin, config.model, file)
        assert (weights.backbone.architecture, weights.widths) == ("resnet18", "10-12-9")
        assert twin.state_dict().keys() == expected.keys()
        assert all(torch.equal(twin.state_dict()[key], value) for key, value in expected.items())
    if out.suffix == ".pth":
        first, second = (torch.load(file, weights_only=True) for file in (out, again))
        assert first["epoch"] == second["epoch"] == 2
        assert first["optimizer"]["param_groups"] == second["optimizer"]["param_groups"]
        momenta = [[state["mu"] for state in f["optimizer"]["state"].values()] for f in (first, second)]
        assert len(momenta[0]) == len(list(twin.parameters())) and any(mu.any() for mu in momenta[0])
        assert all(torch.equal(*pair) for pair in zip(*momenta, strict=True))
    else:
        assert load_file(out).keys() == expected.keys()


@pytest.mark.parametrize("norm", ["twin", "torch"])
@pytest.mark.parametrize("is_wrapped", [True, False])
def test_their_checkpoint_gives_equal_outputs(
    config: RunConfig, tmp_path: Path, is_wrapped: bool, norm: str
) -> None:
    torch.manual_seed(6)
    model, path = random_authors_model(), tmp_path / "checkpoint.pth"
    save_as_theirs(model, path, **({} if is_wrapped else {"model": model.state_dict()}))
    ours = config.model.model_copy(update={"norm": norm})
    twin = Twin(ours)
    start_from(twin, ours, path)
    views_VNCHW = torch.randn(2, 3, 3, 40, 40)
    model.eval()
    with torch.inference_mode():
        features = [model.backbone(view) for view in views_VNCHW]
        embeddings = [model.projector(feature) for feature in features]
        assert (features[0][0] != features[0][1]).float().mean() > 0.5  # a live network
        assert torch.equal(load_backbone(path)(views_VNCHW[0]), features[0])
        for z_ND, expected_ND in zip(twin.eval()(views_VNCHW), embeddings, strict=True):
            torch.testing.assert_close(z_ND, expected_ND, rtol=1e-5, atol=1e-5)
    weights = read_weights(path)
    assert (weights.name, weights.normalisation, weights.eval_settings) == ("resnet18", IMAGENET, None)


def test_backbone_alone_leaves_the_projector_as_it_was(config: RunConfig, run: tuple, tmp_path: Path) -> None:
    torch.manual_seed(9)
    theirs = random_authors_model().backbone
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    twin = Twin(config.model)
    before = {name: value.clone() for name, value in twin.projector.state_dict().items()}
    assert start_from(twin, config.model, tmp_path / "resnet50.pth").projector is None
    assert all(torch.equal(twin.projector.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(twin.backbone.state_dict()[k], v) for k, v in theirs.state_dict().items())
    with pytest.raises(ModelError, match=r"holds a backbone alone; .* leave out --with-projector"):
        export_twin(tmp_path / "resnet50.pth", tmp_path / "twin.pth")


def test_what_does_not_fit_is_one_sentence(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    model = random_authors_model()

    def refusal(**changes: object) -> str:
        changed = config.model.model_copy(update=changes)
        with torch.device("meta"):
            twin = Twin(changed)
        with pytest.raises(ModelError) as caught:
            start_from(twin, changed, path)
        message = str(caught.value)
        assert str(path) in message and "\n" not in message and message.endswith(".")
        return message

    save_as_theirs(model, path)
    assert "holds resnet18, but the run's backbone is resnet34" in refusal(backbone="resnet34")
    assert "the run's backbone is resnet18 with the small stem" in refusal(small_stem=True)
    assert "has the widths 10-12-9, but model.projector is 10-12" in refusal(projector="10-12")
    state = Wrapped(model).state_dict()
    for name in state:
        if ".backbone." in name:
            state[name] = torch.zeros((), dtype=state[name].dtype).expand_as(state[name])  # a few bytes
    last = "module.projector.6.weight"
    for changed, words in (
        ({last: torch.zeros(9, 11)}, "of another shape projector.6.weight (9, 11) instead of (9, 12)"),
        ({last: state[last].to_sparse()}, "holds neither"),
        ({last: torch.zeros(9, 12, device="meta")}, "holds neither"),
        ({last: 3}, "holds neither"),
        ({last: torch.full((9, 12), torch.nan)}, "not all finite"),
        ({last: torch.zeros(()).expand(9, 12)}, "claims more numbers than it holds"),
        (
            {
                "module.projector.3.weight": torch.zeros(()).expand(2**40, 10),
                last: torch.zeros(()).expand(2**40, 12),  # a layer between the two has no size in 64 bits
            },
            "claims more numbers than it holds",
        ),
        ({"module.projector.new": torch.zeros(1)}, "unexpected projector.new"),
        ({"module.head.weight": torch.zeros(1)}, "unexpected head.weight"),
    ):
        save_as_theirs(model, path, model=state | changed)
        assert words in refusal()
    del state[last]
    save_as_theirs(model, path, model=state)
    assert "unexpected projector.4.weight" in refusal()


@pytest.mark.parametrize(
    "optimizer",
    [
        {"state": {0: {"mu": torch.zeros(2)}}, "param_groups": []},
        {"state": {10**6: {"mu": torch.zeros(2)}}},
        [1],
    ],
)
def test_export_refuses_an_optimiser_of_another_network(tmp_path: Path, optimizer: object) -> None:
    save_as_theirs(random_authors_model(), tmp_path / "checkpoint.pth", optimizer=optimizer)
    with pytest.raises(ModelError, match=r"The optimiser's state in \S* does not fit its network"):
        export_twin(tmp_path / "checkpoint.pth", tmp_path / "again.pth")
    assert not (tmp_path / "again.pth").exists()


def test_export_refuses_epochs_that_are_no_number(tmp_path: Path) -> None:
    save_as_theirs(random_authors_model(), tmp_path / "checkpoint.pth", epoch=torch.zeros(2))
    with pytest.raises(ModelError, match="pass an intact checkpoint"):
        export_twin(tmp_path / "checkpoint.pth", tmp_path / "again.pth")


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_have_torchvisions_names_and_shapes_without_the_classifier(name: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)().state_dict()
        for norm in ("twin", "torch"):
            ours = build_backbone(name, norm=norm).state_dict()
            assert [*ours, "fc.weight", "fc.bias"] == list(theirs)
            assert all(value.shape == theirs[key].shape for key, value in ours.items())


def test_their_whole_checkpoint_is_exported_for_torchvision(tmp_path: Path) -> None:
    """To the file that their own code writes."""
    torch.manual_seed(0)
    model = random_authors_model()
    save_as_theirs(model, tmp_path / "checkpoint.pth")
    export_backbone(tmp_path / "checkpoint.pth", tmp_path / "resnet18.pth")
    state = torch.load(tmp_path / "resnet18.pth", weights_only=True)
    assert list(state) == list(model.backbone.state_dict())
    theirs = torchvision.models.resnet18()
    assert theirs.load_state_dict(state, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    assert all(torch.equal(theirs.state_dict()[k], v) for k, v in model.backbone.state_dict().items())
