"""Write the dependency lists of the images, taken from pyproject.toml.

python requirements.py pyproject.toml FOLDER      writes FOLDER/service.txt and FOLDER/trainer.txt
"""

import sys
import tomllib
from pathlib import Path

EXTRAS = {"service": ["service", "openvino"], "trainer": ["training", "demo"]}


def main(pyproject: Path, folder: Path) -> None:
    project = tomllib.loads(pyproject.read_text())["project"]
    for image, extras in EXTRAS.items():
        lines = [*project["dependencies"]]
        for extra in extras:
            lines += project["optional-dependencies"][extra]
        (folder / f"{image}.txt").write_text("\n".join(sorted(lines)) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
