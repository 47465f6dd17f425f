"""What a run has learnt so far: taken over from its last good checkpoint, and written to the next one."""

from pathlib import Path

import torch

from model.twin import Twin
from pipelines.batch import Loader
from train.checkpoint import (
    CHECKPOINT_NAME,
    CheckpointWriter,
    check_fits,
    check_resumable,
    load_last_good,
    set_aside,
)
from train.config import RunConfig
from train.distributed import World
from train.errors import TrainingError
from train.initial_weights import load_initial_weights
from train.preemption import News
from train.probe import OnlineProbe
from train.step import TrainStep


class RunState:
    """Network, optimiser, scaler and probe of a run, as one thing that is resumed and saved.

    `saved_step` is that of the last good checkpoint, -1 for none; rank 0 knows it, the others hear of it.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        twin: Twin,
        train_step: TrainStep,
        probe: OnlineProbe | None,
        loader: Loader,
    ) -> None:
        self.config, self.world, self.loader = config, world, loader
        self.twin, self.train_step, self.probe = twin, train_step, probe
        self.checkpoint: Path = config.run_dir / CHECKPOINT_NAME
        self.writer = CheckpointWriter(self.checkpoint, config.train.checkpoint.every_minutes)
        self.saved_step = -1
        self._last_try = -1  # the step of the last checkpoint, written or not

    @property
    def wants_saving(self) -> bool:
        """Whether time has come; rank 0 decides."""
        return self.world.is_main and self.writer.is_due

    def is_wanted(self, news: News) -> bool:
        """Whether rank 0 wanted a checkpoint that has not been written, or tried, since it said so."""
        return news.wants_checkpoint and news.step > self._last_try

    def resume(self) -> int:
        """Take over the run directory's checkpoint; returns the steps it has seen, 0 without one.

        Without one the weights are those of `train.initial_weights`, or as drawn.
        """
        state, is_sound = None, True
        if self.config.train.checkpoint.resume:
            state, is_sound = load_last_good(self.checkpoint)
        if state:
            check_resumable(state, self.config, self.loader.num_samples, self.checkpoint)
            check_fits(state, self.twin, self.train_step.optimizer, self.checkpoint)
        start = state["step"] if state else 0
        if len(set(self.world.gather(start))) > 1:
            raise TrainingError(
                f"The processes find different checkpoints in run_dir {self.config.run_dir}; "
                f"it must be one folder that all machines share."
            )
        if not is_sound and self.world.is_main:  # and all have looked at it
            set_aside(self.checkpoint)
        if state:
            self.twin.load_state_dict(state["model"])
            self.train_step.optimizer.load_state_dict(state["optimizer"])
            if self.probe is not None and state.get("probe"):
                self.probe.load_state_dict(state["probe"])
            if state["scaler"] and self.train_step.scaler.is_enabled():
                self.train_step.scaler.load_state_dict(state["scaler"])
            self.saved_step = start
        else:
            load_initial_weights(self.twin, self.config, self.world)
        return start

    def save(self, done: int, is_last: bool) -> None:
        """Write the checkpoint, unless the run has gone astray."""
        self._refuse_if_broken(done)
        self._last_try = done
        if self.world.is_main:
            state = {
                "config": self.config.model_dump(mode="json"),
                "model": self.twin.state_dict(),
                "optimizer": self.train_step.optimizer.state_dict(),
                "scaler": self.train_step.scaler.state_dict(),
                "step": done,
                "num_samples": self.loader.num_samples,
                "probe": {} if self.probe is None else self.probe.state_dict(),
            }
            if self.writer.write(state, is_last=is_last):
                self.saved_step = done

    def _refuse_if_broken(self, done: int) -> None:
        """A checkpoint of broken weights would be worse than none: the run could never go on from it."""
        momenta = [state["mu"] for state in self.train_step.optimizer.state.values()]
        tensors = [t for t in (*self.twin.state_dict().values(), *momenta) if t.is_floating_point()]
        if not torch.stack(torch._foreach_norm(tensors)).isfinite().all():
            raise self.failure("state of the network", done)

    def failure(self, what: str, done: int) -> TrainingError:
        """The error for a run in which `what` was not finite after `done` steps."""
        saved = "no checkpoint has been written yet"
        if self.saved_step >= 0:
            saved = f"the last good checkpoint is {self.checkpoint} of step {self.saved_step}"
        epoch = (done - 1) // self.loader.steps_per_epoch
        return TrainingError(
            f"The {what} is not finite any more at step {done} (epoch {epoch}); {saved}; "
            f"lower train.optim.lr_weights and lr_biases, or set train.precision to bf16 or fp32."
        )
