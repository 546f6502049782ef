"""The keys of a recipe, as the documentation has them."""

from pathlib import Path

from visionmix.tools import recipe, train
from visionmix.tools.recipe_keys import tables

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def test_the_page_on_training_has_the_keys_as_the_command_prints_them(capsys):
    assert train.main(["--keys"]) == 0
    printed = capsys.readouterr().out
    assert printed == tables() + "\n"
    assert PAGE.read_text().endswith(f"\n\n{printed}"), "write what `visionmix train --keys` prints to docs/training.md"
    assert "| `clip_grad` | null | bound of the gradient" in printed


def test_a_recipe_of_an_earlier_version_lacks_keys_that_had_their_defaults():
    new = recipe.to_dict(recipe.from_dict({"train": {"accumulate": 2}}, "test"))
    old = recipe.to_dict(recipe.from_dict({"train": {"seed": 1}}, "test"))
    del old["distill"], old["train"]["accumulate"], old["train"]["mesa"]
    assert recipe.differences(old, new) == ["train.seed=0 (was 1)", "train.accumulate=2 (was 1)"]
