"""What data and objective imply for the use of a network: what holds for all, and what its settings imply."""

from typing import Any

INTENDED_USE = (
    "features of still images for tasks that are trained and evaluated anew, such as classification, "
    "retrieval and detection, and research on representations."
)
DISALLOWED_USE = (
    "identifying people or inferring what they are like, deciding about people, and anything in which a "
    "wrong answer harms, unless it has been evaluated for that very use."
)

_IMAGENET = (
    "It learned from ImageNet. Its pictures were collected from the web without asking those whom they show: "
    "17 % of those of 2012 contain faces (Yang et al. 2022, A Study of Face Obfuscation in ImageNet), and "
    "most whose place is known come from North America and Europe (Shankar et al. 2017, No Classification "
    "without Representation). What a network finds alike reflects that, labels or none: self-supervised "
    "networks trained on it carry human-like biases on race and gender (Steed and Caliskan "
    "2021). ImageNet's terms of access allow non-commercial research and education."
)
_OTHER_DATA = (
    "What the training images show, whom, and who agreed to it, is unknown to this card. Features reflect "
    "what is frequent in them, biases about people and places included, even where no labels were used."
)


def limits_of(card: dict[str, Any]) -> list[str]:
    """One sentence or some for each."""
    limits = [_IMAGENET if card["data"]["is_imagenet"] else _OTHER_DATA]
    settings = card["settings"]
    if settings is None:
        limits.append("How views were distorted is unknown, and so is what the features ignore.")
    else:
        limits += _of_distortions(settings["data"])
        size, checkpoint = settings["data"]["image_size"], card["checkpoint"]
        limits.append(f"Its views had {size} x {size} pixels; images of other sizes are another domain.")
        if checkpoint["step"] < checkpoint["total_steps"]:
            limits.append(
                f"Training was not at its end: {checkpoint['step']:,} of {checkpoint['total_steps']:,} steps."
            )
    if not card["evaluations"]:
        limits.append("How good its features are is unknown: it was not evaluated.")
    return limits


def _of_distortions(data: dict[str, Any]) -> list[str]:
    """The objective makes features equal for both views of an image: what tells these apart is lost."""
    views = data["augment"]["view_a"], data["augment"]["view_b"]

    def any_view(*names: str) -> bool:
        return any(view[name] > 0 for view in views for name in names)

    limits = []
    if any_view("grayscale_p") or (any_view("jitter_p") and any_view("hue", "saturation")):
        limits.append(
            "An image and its recoloured copy were made alike: tasks that turn on colour may suffer."
        )
    if any_view("flip_p"):
        limits.append("An image and its mirror image were made alike: left, right and writing count less.")
    if any(view["crop_scale"][0] < 0.5 for view in views):
        least = min(view["crop_scale"][0] for view in views)
        limits.append(
            f"Two crops of an image, each of down to {least:.0%} of its area, were made alike: that suits "
            f"pictures of one thing; how large and where a thing is, among others, it tells less well."
        )
    if any_view("blur_p"):
        limits.append("Blurred copies were made alike: fine texture counts less.")
    return limits
