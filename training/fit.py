"""Train a network on a data set; stop it at any time, run the same command again to go on.

    python -m training.fit CONFIG DATA_FOLDER RUN_FOLDER

The network's kind in the configuration chooses batches, loss and schedule (`training.recipes`). With `initial_model`,
training starts from the weights of that Keras file; with `precision = "mixed_float16"` a GPU computes in half
precision; with `tensorboard = true` the scores go to RUN_FOLDER/tensorboard too. RUN_FOLDER receives `checkpoint.keras`
after every epoch (weights, optimiser, epoch, best score and what else the schedule keeps), `history.csv` and
`model.keras` (when the last epoch is done). Batches depend on the seed and the epoch alone, so a resumed run goes on as
if it had never stopped. Exit-wave networks hold `shards_in_memory` shards at a time, the others all of them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import keras
from tqdm import tqdm

from training.config import read_config
from training.recipes import recipe

STATE = "training_state.json"


def save_atomically(model: keras.Model, path: Path, state: dict[str, Any]) -> None:
    """Write model and state into one file, beside `path` first, so that a kill leaves the last whole one."""
    unfinished = path.with_name(f"unfinished_{path.name}")
    model.save(unfinished)
    with zipfile.ZipFile(unfinished, "a") as file:
        file.writestr(STATE, json.dumps(state))
    os.replace(unfinished, path)


def read_state(path: Path) -> dict[str, Any]:
    """The state that `save_atomically` wrote; empty for a model that was saved without."""
    with zipfile.ZipFile(path) as file:
        return json.loads(file.read(STATE)) if STATE in file.namelist() else {}


def append(history: Path, row: dict[str, Any]) -> None:
    """Add a row to the CSV file; columns that it lacked so far are added, rows of the same epoch or later replaced."""
    rows = []
    if history.exists():
        with open(history, newline="") as file:
            rows = [old for old in csv.DictReader(file) if int(old["epoch"]) < row["epoch"]]
    rows.append({name: str(value) for name, value in row.items()})
    names = list(dict.fromkeys(name for one in rows for name in one))
    unfinished = history.with_suffix(".unfinished")
    with open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, history)


def log_scalars(folder: Path, row: dict[str, Any]) -> None:
    """Add a row to the TensorBoard log."""
    from tensorboard.summary import Writer

    writer = Writer(str(folder))
    for name, value in row.items():
        if name != "epoch":
            writer.add_scalar(name.replace(" ", "_"), value, row["epoch"])
    writer.close()


def fit(config: dict, data: Path, run: Path) -> None:
    """Train, or go on training, as the module's docstring says."""
    run.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(config["seed"])
    keras.config.set_dtype_policy(config.get("precision", "float32"))
    chosen = recipe(config)
    numbers = sorted(int(path.stem.split("_")[1]) for path in data.glob("shard_*.npz"))
    held_out = config["validation_shards"]
    training, validation = (chosen.load(data, part) for part in (numbers[held_out:], numbers[:held_out]))
    checkpoint, history = run / "checkpoint.keras", run / "history.csv"
    first, state = 0, {}
    if checkpoint.exists():
        model = keras.saving.load_model(checkpoint)
        state = read_state(checkpoint)
        first = state.pop("epoch", int(model.optimizer.iterations) // config.get("batches_per_epoch", 1))
        chosen.compile(model, first - 1, model.optimizer)
    else:
        model = chosen.network()
        if "initial_model" in config:
            shapes = [weight.shape for weight in model.get_weights()]
            model = keras.saving.load_model(config["initial_model"], compile=False)
            if [weight.shape for weight in model.get_weights()] != shapes:
                raise ValueError(
                    f"initial_model is {config['initial_model']}, whose layers aren't those of the configuration; "
                    "set the same there (`training.grow` adds residual blocks to an image network)."
                )
        chosen.compile(model, 0, None)
    print(f"{len(numbers)} shards, {model.count_params()} parameters, from epoch {first}", flush=True)
    counted = config.get("batch_size", 1)
    samples = counted * len(chosen.batches(training, first))
    unit = " samples" if "batch_size" in config else " batches"
    progress = tqdm(initial=first * samples, total=chosen.epochs * samples, unit=unit)
    shown = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: progress.update(counted))
    for epoch in range(first, chosen.epochs):
        if chosen.changes(epoch):
            chosen.compile(model, epoch, model.optimizer)
        batches = chosen.batches(training, epoch)
        model.optimizer.learning_rate.assign(chosen.learning_rate(epoch, state))
        started = time.perf_counter()
        once = {"initial_epoch": epoch, "epochs": epoch + 1, "shuffle": False, "verbose": 0, "callbacks": [shown]}
        loss = model.fit(batches, **once).history["loss"][0]
        rate = len(batches) / (time.perf_counter() - started)
        scores = chosen.validate(model, validation, epoch, state)
        if scores:
            row = {"epoch": epoch, "loss": loss} | scores
            print({name: round(value, 4) for name, value in row.items()}, f"{rate:.2f} batches/s", flush=True)
            append(history, row)
            if config.get("tensorboard", False):
                log_scalars(run / "tensorboard", row)
        save_atomically(model, checkpoint, state | {"epoch": epoch + 1})
    progress.close()
    save_atomically(model, run / "model.keras", state | {"epoch": chosen.epochs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("config", "data", "run"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    fit(read_config(arguments.config), arguments.data, arguments.run)


if __name__ == "__main__":
    main()
