"""What `training.fit` needs to know of a kind of network: its batches, optimiser, loss, schedule and scores."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Protocol

import keras
import numpy as np

from training.batches import Batches
from training.dataset import load_shards
from training.exit_wave_batches import ExitWaveBatches, correlation
from training.exit_wave_loss import WEIGHTS, ExitWaveLoss
from training.features import FeatureBatches, Features, network_inputs
from training.image_networks import StitchedNetwork
from training.losses import PhaseImageError, StitchedExitWaveError, exit_wave_error, phase_scores
from training.networks import NETWORKS
from training.scan_batches import SCAN_DOSE_RANGE, ScanBatches, Scans
from training.streaming import Shards, StreamedBatches
from training.unet import complex_unet, unet

VALIDATION_DRAWS = 4
STITCHED_KIND, IMAGE_KIND = "stitched", "stitched_image"
EXIT_WAVE_NETWORKS = {network.__name__: network for network in (unet, complex_unet)}


class Recipe(Protocol):
    """Attribute: `epochs` of the whole training."""

    epochs: int

    def load(self, folder: Path, numbers: list[int]) -> Any:
        """What `batches` and `validate` take, from these shards."""

    def network(self) -> keras.Model: ...

    def compile(self, model: keras.Model, epoch: int, optimizer: Any) -> None:
        """Set loss and optimiser (a new one for None) for this epoch."""

    def changes(self, epoch: int) -> bool:
        """Whether the loss of this epoch is another than that of the one before."""

    def batches(self, shards: Any, epoch: int) -> keras.utils.PyDataset: ...

    def learning_rate(self, epoch: int, state: dict) -> float: ...

    def validate(self, model: keras.Model, shards: Any, epoch: int, state: dict) -> dict[str, float]:
        """Scores, and the state that the schedule keeps, changed in place."""


def recipe(config: dict) -> Recipe:
    """The recipe of a configuration, by its network's kind."""
    kind = config["network"]["kind"]
    if kind in NETWORKS:
        return WindowRecipe(config)
    if kind in EXIT_WAVE_NETWORKS:
        return ExitWaveRecipe(config)
    if kind == STITCHED_KIND:
        return StitchedRecipe(config)
    if kind == IMAGE_KIND:
        return ImageRecipe(config)
    known = [*NETWORKS, *EXIT_WAVE_NETWORKS, STITCHED_KIND, IMAGE_KIND]
    raise ValueError(f"kind of [network] is {kind!r}; known are {', '.join(known)}.")


def cosine_decay(config: dict, epoch: int) -> float:
    """From the configured rate to 0 over all epochs, a tenth of the rate in the first."""
    if epoch == 0:
        return float(config["learning_rate"] / 10)
    return float(config["learning_rate"] * 0.5 * (1 + np.cos(np.pi * epoch / config["epochs"])))


class WindowRecipe:
    """Networks that give the object in a window: AdamW, cosine decay, error of the stitched image."""

    def __init__(self, config: dict) -> None:
        self.config, self.epochs = config, config["epochs"]

    def load(self, folder: Path, numbers: list[int]) -> dict:
        return load_shards(folder, numbers)

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
        return cosine_decay(self.config, epoch)

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


class PhaseImageRecipe:
    """Networks that give a phase image: AdamW, cosine decay, relative error of the phase image."""

    #: What the configuration may say of the loss.
    loss_arguments: tuple[str, ...] = ("strength_floor", "correlation_weight", "noise_of_one_electron")

    def __init__(self, config: dict) -> None:
        self.config, self.epochs = config, config["epochs"]

    def network(self) -> keras.Model:
        return StitchedNetwork(self.config["encoder"], self.config["image"])

    def compile(self, model: keras.Model, epoch: int, optimizer: Any) -> None:
        if optimizer is None:
            optimizer = keras.optimizers.AdamW(weight_decay=self.config["weight_decay"], global_clipnorm=1.0)
        model.compile(optimizer, self.loss())

    def loss(self) -> PhaseImageError:
        return PhaseImageError(**{name: self.config[name] for name in self.loss_arguments if name in self.config})

    def changes(self, epoch: int) -> bool:
        return False

    def learning_rate(self, epoch: int, state: dict) -> float:
        return cosine_decay(self.config, epoch)


class StitchedRecipe(PhaseImageRecipe):
    """Pattern encoder and image network together, on whole scans.

    `dose_range` of the configuration, if there, holds the limits of the doses, in electrons in 1 / k0^2.
    """

    def load(self, folder: Path, numbers: list[int]) -> Scans:
        return Scans(folder, numbers)

    def batches(self, shards: Scans, epoch: int) -> ScanBatches:
        config = self.config
        return ScanBatches(
            shards,
            config["batches_per_epoch"],
            config["seed"],
            epoch,
            dose_range=tuple(config.get("dose_range", SCAN_DOSE_RANGE)),
            workers=2,
            max_queue_size=8,
        )

    def validate(self, model: keras.Model, shards: Scans, epoch: int, state: dict) -> dict[str, float]:
        """Median relative error and mean correlation of the phase at every validation dose."""
        config = self.config
        if (epoch + 1) % config["validate_every"] and epoch + 1 != self.epochs:
            return {}
        scores = {}
        for dose in config["validation_doses"]:
            errors, correlations = [], []
            for inputs, target in (ScanBatches(shards, 0, config["seed"], 0, dose)[n] for n in range(len(shards))):
                true = target[..., 0][target[..., 0] != 0]
                predicted = np.asarray(model(inputs))[..., 0][target[..., 0] != 0]
                errors.append(np.sqrt(np.mean((predicted - true) ** 2) / np.var(true)))
                correlations.append(np.corrcoef(predicted, true)[0, 1])
            name = f"{dose:g}" if dose else "no noise"
            scores[f"error at {name}"] = float(np.median(errors))
            scores[f"xc at {name}"] = float(np.mean(correlations))
        return scores


class ImageRecipe(PhaseImageRecipe):
    """The image network alone, on feature images (`training.features`) that its encoder made.

    With `teacher_weight` it also learns from the mean over the eight symmetries that the features were made with.
    """

    loss_arguments = (*PhaseImageRecipe.loss_arguments, "teacher_weight")

    def load(self, folder: Path, numbers: list[int]) -> Features:
        return Features(folder, numbers, teacher=self.config.get("teacher_weight", 0.0) > 0)

    def compile(self, model: keras.Model, epoch: int, optimizer: Any) -> None:
        model.encoder.trainable = False
        super().compile(model, epoch, optimizer)

    def batches(self, shards: Features, epoch: int) -> FeatureBatches:
        config = self.config
        # with one worker tf.data fetches ahead, whose tuning sleeps for up to a minute, and an epoch's end waits for it
        return FeatureBatches(shards, config["batches_per_epoch"], config["seed"], epoch, workers=2, max_queue_size=8)

    def validate(self, model: keras.Model, shards: Features, epoch: int, state: dict) -> dict[str, float]:
        """Mean correlation of the phase of images by their dose, electrons in 1 / k0^2."""
        config = self.config
        if (epoch + 1) % config["validate_every"] and epoch + 1 != self.epochs:
            return {}
        correlations = []
        for image, target, row in zip(shards.images, shards.targets, shards.numbers, strict=True):
            seen = target != 0
            predicted = np.asarray(model(network_inputs(image[None], row[None])))[0, ..., 0]
            flat = seen.sum() == 0 or target[seen].std() == 0
            correlations.append(np.nan if flat else np.corrcoef(predicted[seen], target[seen])[0, 1])
        noise = shards.numbers[:, 4]
        scores, edges = {}, [*config["validation_doses"], np.inf]
        for low, high in itertools.pairwise(edges):
            chosen = (noise <= 1 / low) & (noise > 1 / high if np.isfinite(high) else True)
            scores[f"xc from {low:g}"] = float(np.nanmean(np.array(correlations)[chosen]))
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

    def load(self, folder: Path, numbers: list[int]) -> Shards:
        phase = ("phase",) if self.config["label"] == "projected_phase" else ()
        return Shards(folder, numbers, ("amplitudes", "exit_wave", "parameters", *phase))

    def network(self) -> keras.Model:
        arguments = dict(self.config["network"])
        return EXIT_WAVE_NETWORKS[arguments.pop("kind")](**arguments)

    def compile(self, model: keras.Model, epoch: int, optimizer: Any) -> None:
        weights = self.weights | (self.second if epoch >= self.first_epochs else {})
        model.compile(keras.optimizers.Adam(beta_1=0.9) if optimizer is None else optimizer, ExitWaveLoss(weights))

    def changes(self, epoch: int) -> bool:
        return epoch == self.first_epochs

    def batches(self, shards: Shards, epoch: int) -> StreamedBatches:
        config = self.config
        return StreamedBatches(
            shards,
            config["shards_in_memory"],
            config["batch_size"],
            lambda arrays, seed: ExitWaveBatches(arrays, config["batch_size"], config["label"], seed, epoch),
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

    def validate(self, model: keras.Model, shards: Shards, epoch: int, state: dict) -> dict[str, float]:
        """Validation loss at random doses, the same each time; xc of the object's phase at every validation dose."""
        config, arrays = self.config, shards.read()
        batch = min(config["batch_size"], config["validation_samples"])
        count = config["validation_samples"] // batch
        fixed = ExitWaveBatches(arrays, batch, config["label"], config["seed"], 0, count, augment=False)
        scores = {"validation loss": float(model.evaluate(fixed, verbose=0))}
        if state.get("best") is None or scores["validation loss"] < state["best"]:
            state |= {"best": scores["validation loss"], "waited": 0}
        else:
            state["waited"] += 1
        if (epoch + 1) % config["validate_every"] and epoch + 1 != self.epochs:
            return scores
        for dose in config["validation_doses"]:
            batches = ExitWaveBatches(
                arrays, batch, config["label"], config["seed"], 0, count, augment=False, dose=dose or float("inf")
            )
            pairs = [
                (target, model.predict_on_batch(inputs)) for inputs, target in map(batches.__getitem__, range(count))
            ]
            target, prediction = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
            scores[f"xc at {dose:g}" if dose else "xc at no noise"] = correlation(target, prediction)
        return scores
