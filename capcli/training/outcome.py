"""What a training run leaves in its folder: the best checkpoint as a captioner, with its model card."""

from __future__ import annotations

import os
import shutil

from capcli.models import files
from capcli.options import TrainOptions
from capcli.training import checkpoints
from capcli.training.assembly import Untrained
from capcli.training.data import Data
from capcli.training.place import Place
from capcli.training.trainer import CaptionTrainer
from capcli.training.view import View


def leave_captioner(
    options: TrainOptions, place: Place, made: Untrained, data: Data, trainer: CaptionTrainer, view: View
) -> None:
    """Puts the best checkpoint into the folder itself, with a model card, and says where to find it."""
    ranked = checkpoints.ranking(trainer.state.log_history, options.select)
    there = checkpoints.whole(place.checkpoints)
    chosen = next(iter(checkpoints.best(place.checkpoints, ranked, 1)), max(there))
    put_in_place(there[chosen], place.folder)


def put_in_place(checkpoint: str, folder: str) -> None:
    """Copies a checkpoint's captioner; each file is there whole or not at all, the weights last."""
    shelf = files.shelf_of(checkpoint)
    weights = files.weight_files(shelf)
    for name in (*files.setting_files(shelf.names), *weights):
        shutil.copyfile(os.path.join(checkpoint, name), os.path.join(folder, f"{name}.tmp"))
        os.replace(os.path.join(folder, f"{name}.tmp"), os.path.join(folder, name))
