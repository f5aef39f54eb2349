"""Fuzz both readers for FUZZ_S seconds each: `make fuzz`. A crash is kept in .tosca/fuzz/ and fails the run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

DURATION_S = int(os.environ.get("FUZZ_S", "120"))
FOLDER = Path(".tosca/fuzz")
RESULT = Path("benchmarks/results/fuzz.json")
TARGETS = ("fuzz_module", "fuzz_image")


def main() -> None:
    report = {target: fuzz(target) for target in TARGETS}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    sys.exit(any(one["crashes"] for one in report.values()))


def fuzz(target: str) -> dict[str, int]:
    corpus, crashes = FOLDER / target / "corpus", FOLDER / target / "crashes"
    for one in (corpus, crashes):
        one.mkdir(parents=True, exist_ok=True)
    before = set(crashes.iterdir())
    command = [
        sys.executable,
        str(Path(__file__).with_name(f"{target}.py")),
        f"-max_total_time={DURATION_S}",
        "-timeout=10",  # seconds for one input
        "-rss_limit_mb=4096",
        "-max_len=65536",
        "-print_final_stats=1",
        f"-artifact_prefix={crashes}/",
        str(corpus),
    ]
    result = subprocess.run(
        command, stderr=subprocess.PIPE, text=True, errors="replace", timeout=DURATION_S + 300, check=False
    )
    executed = re.search(r"number_of_executed_units: (\d+)", result.stderr)
    found = set(crashes.iterdir()) - before
    if result.returncode != 0 or found or executed is None:
        print(result.stderr[-6000:])
    return {
        "seconds": DURATION_S,
        "executions": int(executed.group(1)) if executed else 0,
        "corpus": len(list(corpus.iterdir())),
        "crashes": max(len(found), int(result.returncode != 0)),
    }


if __name__ == "__main__":
    main()
