"""How to load each kind of exported file: code for its model card."""

from typing import Any

from tools.export.network import INPUT, OUTPUTS

_STEM = """network.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)  # the small stem
network.maxpool = torch.nn.Identity()
"""


def usage_of(card: dict[str, Any]) -> str:
    """Which images it takes, and a piece of code for every file."""
    model = card["model"]
    intro = (
        f"Images are RGB, float32, (N, 3, H, W), from 0 to 1, then minus the mean {model['mean']} and "
        f"divided by the deviation {model['std']} of each channel. `.onnx`, `.pt2`, `.ts` and `.torchscript` "
        f"are programs: run those alone whose SHA-256 you have compared with this card's."
    )
    return "\n\n".join([intro, *(f"```python\n{_code(file, model)}\n```" for file in card["files"])])


def _code(file: dict[str, Any], model: dict[str, Any]) -> str:
    name, suffix, backbone = file["file"], file["file"].rpartition(".")[2], model["backbone"]
    outputs = ", ".join(OUTPUTS[: 2 if file["projector"] else 1]) + ("" if file["projector"] else ",")
    match suffix:
        case "onnx":
            return (
                f"session = onnxruntime.InferenceSession({name!r})\n"
                f"{outputs} = session.run(None, {{{INPUT!r}: images}})  # numpy arrays"
            )
        case "pt2":
            return f"network = torch.export.load({name!r}).module()\n{outputs} = network(images)"
        case "ts" | "torchscript":
            return f"network = torch.jit.load({name!r})\n{outputs} = network(images)"
        case "pth" if not file["projector"]:
            stem = _STEM if model["small_stem"] else ""
            return (
                f"network = torchvision.models.{backbone}()\n{stem}"
                f"network.load_state_dict(torch.load({name!r}), strict=False)  # misses fc.* alone\n"
                f"network.fc = torch.nn.Identity()\n"
                f"features = network.eval()(images)"
            )
        case "pth":
            return (
                f"checkpoint = torch.load({name!r}, weights_only=True)  # of facebookresearch/barlowtwins\n"
                f"checkpoint['model']  # module.backbone.*, module.projector.*, module.bn.*"
            )
        case _:
            start = (
                "backbone.* and projector.*"
                if file["projector"]
                else f"the names of torchvision's {backbone}"
            )
            return (
                f"tensors = safetensors.torch.load_file({name!r})  # {start}\n"
                f"# or, from a checkout of fastbarlow, the backbone with a new classifier:\n"
                f"network = torch.hub.load(CHECKOUT, {backbone!r}, source='local', weights={name!r})"
            )
