"""From a run to a checkpoint folder that `sparing.load` opens."""

from __future__ import annotations

from pathlib import Path

from sparing.checkpoint.write import config_bytes, json_bytes, save_weights
from sparing.errors import CheckpointError
from sparing.training.masters import use_dense
from sparing.training.recipe import Recipe
from sparing.training.run import new_state
from sparing.training.state import FILE, read_run

__all__ = ["export", "recipe_of"]


def recipe_of(out: Path) -> tuple[Recipe, int]:
    """The recipe of a run with its settings, and the run's seed. Raises CheckpointError if there is none."""
    from sparing.training.recipes import RECIPES

    run = read_run(out)
    if run["recipe"] not in RECIPES:
        raise CheckpointError(f"{out / FILE}: recipe {run['recipe']!r:.60} is not known, only {', '.join(RECIPES)}")
    return RECIPES[run["recipe"]].with_settings(run["settings"]), run["seed"]


def export(out: str | Path, folder: str | Path) -> Path:
    """Write the averaged weights of the run in `out` as a bfloat16 checkpoint; returns the folder.

    What models keep in float32 whatever their type is written so.

    Raises CheckpointError if `out` holds no run or the folder cannot be written.
    """
    out, folder = Path(out), Path(folder)
    recipe, seed = recipe_of(out)
    state = new_state(recipe, seed)
    state.load(out)
    model = state.average
    use_dense(model)
    tensors = {name: tensor.detach() for name, tensor in model.bfloat16().state_dict().items()}
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": recipe.text_config["max_position_embeddings"],
    }
    beside = {
        "generation_config.json": json_bytes(recipe.generation_config),
        "tokenizer.json": recipe.data(recipe, seed).tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": json_bytes(tokenizer_config),
        "config.json": config_bytes({**recipe.config, "dtype": "bfloat16"}),
    }
    metadata = {"recipe": recipe.name, "seed": str(seed), "step": str(state.step)}
    save_weights(folder, tensors, metadata=metadata, beside=beside)
    return folder
