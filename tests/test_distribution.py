"""What pyproject.toml says of the distribution, against the tree: an editable install would not notice."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
TOP_LEVEL = ("model_store", "service", "training")


def test_every_package_is_declared() -> None:
    folders = {path.parent.relative_to(ROOT) for top in TOP_LEVEL for path in (ROOT / top).rglob("*.py")}
    assert sorted(SETUPTOOLS["packages"]) == sorted(".".join(folder.parts) for folder in folders)
