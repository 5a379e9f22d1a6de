"""What `training.fit` needs to know of a kind of network: its batches, optimiser, loss, schedule and scores."""

from __future__ import annotations

from typing import Any, Protocol

import keras
import numpy as np

from training.batches import Batches
from training.exit_wave_batches import ExitWaveBatches, correlation
from training.exit_wave_loss import WEIGHTS, ExitWaveLoss
from training.losses import StitchedExitWaveError, exit_wave_error, phase_scores
from training.networks import NETWORKS
from training.unet import complex_unet, unet

VALIDATION_DRAWS = 4
EXIT_WAVE_NETWORKS = {network.__name__: network for network in (unet, complex_unet)}


class Recipe(Protocol):
    """Attributes: `epochs` of the whole training; `arrays`, those of the shards that it needs, all if None."""

    epochs: int
    arrays: tuple[str, ...] | None

    def network(self) -> keras.Model: ...

    def compile(self, model: keras.Model, epoch: int, optimizer: Any) -> None:
        """Set loss and optimiser (a new one for None) for this epoch."""

    def changes(self, epoch: int) -> bool:
        """Whether the loss of this epoch is another than that of the one before."""

    def batches(self, shards: dict, epoch: int) -> keras.utils.PyDataset: ...

    def learning_rate(self, epoch: int, state: dict) -> float: ...

    def validate(self, model: keras.Model, shards: dict, epoch: int, state: dict) -> dict[str, float]:
        """Scores, and the state that the schedule keeps, changed in place."""


def recipe(config: dict) -> Recipe:
    """The recipe of a configuration, by its network's kind."""
    kind = config["network"]["kind"]
    if kind in NETWORKS:
        return WindowRecipe(config)
    if kind in EXIT_WAVE_NETWORKS:
        return ExitWaveRecipe(config)
    raise ValueError(f"kind of [network] is {kind!r}; known are {', '.join([*NETWORKS, *EXIT_WAVE_NETWORKS])}.")


class WindowRecipe:
    """Networks that give the object in a window: AdamW, cosine decay, error of the stitched image."""

    arrays: tuple[str, ...] | None = None

    def __init__(self, config: dict) -> None:
        self.config, self.epochs = config, config["epochs"]

    def network(self) -> keras.Model:
        arguments = dict(self.config["network"])
        return NETWORKS[arguments.pop("kind")](**arguments)

    def compile(self, model: keras.Model, epoch: int, optimizer: Any) -> None:
        if optimizer is None:
            optimizer = keras.optimizers.AdamW(weight_decay=self.config["weight_decay"], global_clipnorm=1.0)
        model.compile(optimizer, StitchedExitWaveError(self.config["strength_floor"]))

    def changes(self, epoch: int) -> bool:
        return False

    def batches(self, shards: dict, epoch: int) -> Batches:
        config = self.config
        return Batches(
            shards,
            config["batch_size"],
            config["batches_per_epoch"],
            config["label"],
            config["seed"],
            epoch,
            stitched=config["stitched"],
            workers=2,
            max_queue_size=8,
        )

    def learning_rate(self, epoch: int, state: dict) -> float:
        """Cosine decay from the configured rate to 0 over all epochs, a tenth of the rate in the first."""
        if epoch == 0:
            return float(self.config["learning_rate"] / 10)
        return float(self.config["learning_rate"] * 0.5 * (1 + np.cos(np.pi * epoch / self.epochs)))

    def validate(self, model: keras.Model, shards: dict, epoch: int, state: dict) -> dict[str, float]:
        """Exit wave error over an empty specimen's, phase correlation and slope, at every validation dose.

        Each is that of the mean of VALIDATION_DRAWS predictions from independent counts, about what an image averages.
        """
        config = self.config
        if (epoch + 1) % config["validate_every"] and epoch + 1 != self.epochs:
            return {}
        scores = {}
        for dose in config["validation_doses"]:
            mean = np.zeros(0, np.float32)
            for draw in range(VALIDATION_DRAWS // 2):
                samples = 2 * config["validation_samples"]
                batches = Batches(shards, samples, 1, config["label"], config["seed"], draw, dose)
                inputs, target = batches[0]
                patches = model.predict(inputs, batch_size=config["batch_size"], verbose=0)
                halves = patches.reshape(2, -1, *patches.shape[1:]).sum(0) / VALIDATION_DRAWS
                mean = halves if draw == 0 else mean + halves
            target = target[: len(mean)]
            error, strength = (np.asarray(value) for value in exit_wave_error(target, mean))
            name = f"{dose:g}" if dose else "no noise"
            scores[f"error at {name}"] = float(error.sum() / strength.sum())
            scores[f"xc at {name}"], scores[f"slope at {name}"] = phase_scores(target, mean)
        return scores


class ExitWaveRecipe:
    """The paper's training: Adam, loss (11), rate halved on a plateau of the validation loss, a second phase.

    `[second_phase]` of the configuration gives its `epochs` and the weights that it changes.
    """

    def __init__(self, config: dict) -> None:
        self.config = config
        self.weights = WEIGHTS | config.get("loss", {})
        self.first_epochs = config["epochs"]
        self.second = dict(config.get("second_phase", {"epochs": 0}))
        self.epochs = self.first_epochs + self.second.pop("epochs")
        unknown = self.second.keys() - WEIGHTS.keys()
        if unknown:
            raise ValueError(f"[second_phase] has {sorted(unknown)}, expected epochs and any of {', '.join(WEIGHTS)}.")
        self.arrays: tuple[str, ...] | None = ("amplitudes", "exit_wave", "parameters")
        if config["label"] == "projected_phase":
            self.arrays = (*self.arrays, "phase")

    def network(self) -> keras.Model:
        arguments = dict(self.config["network"])
        return EXIT_WAVE_NETWORKS[arguments.pop("kind")](**arguments)

    def compile(self, model: keras.Model, epoch: int, optimizer: Any) -> None:
        weights = self.weights | (self.second if epoch >= self.first_epochs else {})
        model.compile(keras.optimizers.Adam(beta_1=0.9) if optimizer is None else optimizer, ExitWaveLoss(weights))

    def changes(self, epoch: int) -> bool:
        return epoch == self.first_epochs

    def batches(self, shards: dict, epoch: int) -> ExitWaveBatches:
        config = self.config
        return ExitWaveBatches(
            shards,
            config["batch_size"],
            config["label"],
            config["seed"],
            epoch,
            config.get("batches_per_epoch"),
            workers=config["workers"],
            max_queue_size=2 * config["workers"],
        )

    def learning_rate(self, epoch: int, state: dict) -> float:
        """Half the rate after `patience` epochs without gain in validation loss; the second phase counts anew."""
        if self.changes(epoch):
            state |= {"best": None, "waited": 0}
        if state.get("waited", 0) >= self.config["patience"]:
            state |= {"rate": state["rate"] / 2, "waited": 0}
        return float(state.setdefault("rate", self.config["learning_rate"]))

    def validate(self, model: keras.Model, shards: dict, epoch: int, state: dict) -> dict[str, float]:
        """Validation loss at random doses, the same each time; xc of the object's phase at every validation dose."""
        config = self.config
        batch = min(config["batch_size"], config["validation_samples"])
        count = config["validation_samples"] // batch
        fixed = ExitWaveBatches(shards, batch, config["label"], config["seed"], 0, count, augment=False)
        scores = {"validation loss": float(model.evaluate(fixed, verbose=0))}
        if state.get("best") is None or scores["validation loss"] < state["best"]:
            state |= {"best": scores["validation loss"], "waited": 0}
        else:
            state["waited"] += 1
        if (epoch + 1) % config["validate_every"] and epoch + 1 != self.epochs:
            return scores
        for dose in config["validation_doses"]:
            batches = ExitWaveBatches(
                shards, batch, config["label"], config["seed"], 0, count, augment=False, dose=dose or float("inf")
            )
            pairs = [
                (target, model.predict_on_batch(inputs)) for inputs, target in map(batches.__getitem__, range(count))
            ]
            target, prediction = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
            scores[f"xc at {dose:g}" if dose else "xc at no noise"] = correlation(target, prediction)
        return scores
