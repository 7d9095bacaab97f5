"""The example of docs/environments.md as files."""

import json
import re
from pathlib import Path

from tests.conftest import ROOT


def write(folder: Path) -> Path:
    """Writes dice.py, dice.yaml, dice.jsonl and my_rollout.py, and returns the recipe: paths lead into `folder`."""
    page = (ROOT / "docs/environments.md").read_text()
    environment, function = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (row,) = re.findall(r"the problems: ({.*})", recipe)
    rows = [row.replace("5", str(target)) for target in range(2, 10)]
    assert json.loads(rows[3]) == {"problem": "5=", "answer": "5"}
    recipe = recipe.replace("recipes/", f"{ROOT}/recipes/").replace(": dice.", f": {folder}/dice.")
    (folder / "dice.py").write_text(environment)
    (folder / "my_rollout.py").write_text(function)
    (folder / "dice.jsonl").write_text("".join(one + "\n" for one in rows))
    (folder / "dice.yaml").write_text(recipe)
    return folder / "dice.yaml"
