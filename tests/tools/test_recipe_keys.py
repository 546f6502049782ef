"""The keys of a recipe, as the documentation has them."""

from pathlib import Path

from visionmix.tools import train
from visionmix.tools.recipe_keys import tables

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def test_the_page_on_training_has_the_keys_as_the_command_prints_them(capsys):
    assert train.main(["--keys"]) == 0
    printed = capsys.readouterr().out
    assert printed == tables() + "\n"
    assert PAGE.read_text().endswith(f"\n\n{printed}"), "write what `visionmix train --keys` prints to docs/training.md"
    assert "| `clip_grad` | null | bound of the gradient" in printed
