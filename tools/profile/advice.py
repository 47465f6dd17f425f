"""The changes that would make a run faster and that are possible on the machine that was measured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

MIN_SHRINK = 0.9  # images are not converted again to save less than a tenth of their sides
SIDE_PER_VIEW = 1.5  # shrunk images keep that many times the view's side, for crops with detail
HOST_LEAD_SHARE = 0.05  # of a step: a host that is less ahead of the GPU holds it up


def number(x: float) -> str:
    """1,900 or 8.21."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def first(changes: str) -> str:
    """The setting and its value, without what is said about it."""
    return changes.partition(" (")[0].partition(",")[0]


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def join(changes: Sequence[str]) -> str:
    return ", or ".join(changes)


def for_loading(profile: Mapping[str, Any], limit: str) -> list[str]:
    """At least one, the best first; `limit` is read, decode, crop or loader."""
    settings = profile["settings"]
    changes = [_other_loader(settings)] if limit == "loader" else []
    changes += [_more_workers(profile)]
    if limit in ("read", "decode"):
        changes += [_smaller_images(profile)]
    if limit == "read":
        changes += ["a faster disk, or a copy of the dataset on a local one"]
    if limit in ("decode", "crop") and settings["device"] == "cuda" and settings["loader"] != "dali":
        changes += ["data.loader=dali, which decodes on the GPU"]
    if limit == "decode" and settings["loader"] == "folder":
        changes += [_other_loader(settings)]
    found = [change for change in changes if change]
    has_workers = any(change.startswith("data.workers") for change in found)
    if not found or (limit != "read" and not has_workers):
        found.append(_more_cores(profile))
    return found


def _more_workers(profile: Mapping[str, Any]) -> str | None:
    """As many as the step could use, as far as there are cores that no rank's workers have."""
    settings, ceilings = profile["settings"], profile["ceilings"]
    cores = settings["cores"] // settings["ranks_per_host"]
    workers = max(1, settings["workers"])
    if workers >= cores:
        return None
    needed = _workers_needed(profile)
    if needed <= cores:
        return f"data.workers={needed} ({plural(needed - workers, 'more core')})"
    reached = ceilings["loader"]["pairs_per_second"] * cores / workers
    all_of_them = "all of this machine's cores"
    if settings["ranks_per_host"] > 1:
        all_of_them = "this rank's share of the cores"
    return f"data.workers={cores} ({all_of_them}, about {number(reached)} pairs/s)"


def _more_cores(profile: Mapping[str, Any]) -> str:
    settings = profile["settings"]
    missing = _workers_needed(profile) - settings["cores"] // settings["ranks_per_host"]
    where = " for each rank" if settings["ranks_per_host"] > 1 else ""
    if missing < 1:
        return f"more cores than the {settings['cores']} here, which loader and step share"
    return f"a machine with {plural(missing, 'more core')}{where}: the {settings['cores']} here are in use"


def _workers_needed(profile: Mapping[str, Any]) -> int:
    ceilings = profile["ceilings"]
    factor = ceilings["step"]["pairs_per_second"] / ceilings["loader"]["pairs_per_second"]
    return math.ceil(factor * max(1, profile["settings"]["workers"]))


def _smaller_images(profile: Mapping[str, Any]) -> str | None:
    """Time and bytes go with the pixels: sides shrink with the square root of what is missing."""
    side = (profile.get("dataset") or {}).get("mean_longer_side")
    if side is None:
        return None
    ceilings = profile["ceilings"]
    missing = ceilings["step"]["pairs_per_second"] / ceilings["loader"]["pairs_per_second"]
    wanted = max(side / math.sqrt(missing), SIDE_PER_VIEW * profile["settings"]["image_size"])
    wanted = 10 * math.ceil(wanted / 10)
    return f"convert with --max-side {wanted}" if wanted < MIN_SHRINK * side else None


def _other_loader(settings: Mapping[str, Any]) -> str | None:
    if settings["loader"] != "folder":
        return None
    if settings["data_path"].endswith(".beton"):
        return "data.loader=ffcv"
    return "convert to a .beton file and data.loader=ffcv"


def for_collectives(settings: Mapping[str, Any], dearest: str | None) -> str:
    """`dearest` is what most of the time is spent for."""
    larger = f"train.batch_size={2 * settings['batch_size']}"
    if dearest == "statistics" and settings["sync_bn"] == "all":
        return f"model.sync_bn=projector (other statistics, another training), or {larger}"
    if dearest == "loss" and settings["loss"] != "auto":
        return "model.loss.algorithm=auto"
    if dearest == "gradients" and settings["micro_batches"] > 1:
        return f"{larger}, with more train.micro_batches, or a faster link"
    return f"{larger}, which needs as many exchanges for twice the pairs, or a faster link"


def for_step(profile: Mapping[str, Any], limit: str) -> str | None:
    """`limit` is step or augment. None where no setting is known to help."""
    settings, step = profile["settings"], profile["ceilings"]["step"]
    on_gpu = settings["device"] == "cuda"
    if limit == "augment":
        if settings["augment"] != "auto":
            return "data.augment.implementation=auto"
        return None if on_gpu else "more cores, or a GPU"
    lead, seconds = step.get("host_lead_seconds"), profile["run"]["step_seconds"]
    if lead is not None and lead < HOST_LEAD_SHARE * seconds and not settings["cuda_graph"]:
        if settings["ranks"] == 1:
            return "train.cuda_graph=true, as the GPU waits for the host to start its kernels"
        return "a larger train.batch_size, as the GPU waits for the host to start its kernels"
    if settings["precision"] == "fp64":
        return "train.precision=fp32"
    if settings["precision"] == "fp32" and (on_gpu or settings["has_bf16"]):
        return f"train.precision={'bf16' if settings['has_bf16'] else 'fp16'}"
    if settings["norm"] == "torch" and not settings["compile"]:
        return "model.norm=twin"
    if settings["micro_batches"] > 1:
        return "fewer train.micro_batches, if the memory allows: each but one is embedded twice"
    return None
