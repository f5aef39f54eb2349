"""`tosca replay`: does an answer hold?"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from model_store.console import (
    DEFAULT_STORE,
    DeviceOption,
    JsonOption,
    RuntimeOption,
    StoreOption,
    choose,
    out,
    print_json,
    read_file,
)
from model_store.replay import differences, read_given
from model_store.replay import replay as answer_again
from model_store.selection import SELECTIONS
from model_store.store import ModelStore
from service.settings import DEFAULT_ABSTAIN_LEVEL


def replay(
    receipt: Annotated[str, typer.Argument(help="JSON file with an answer or a receipt; - reads it here.")],
    picture: Annotated[Path, typer.Argument(help="The picture that was asked about.")],
    index: Annotated[int, typer.Option(min=0, help="Which answer of a response with several.")] = 0,
    task: Annotated[str | None, typer.Option(help="The task that was asked for, if one was.")] = None,
    selection: Annotated[str, typer.Option(help=f"As asked for: {', '.join(SELECTIONS)}.")] = "lda",
    top_k: Annotated[int, typer.Option(min=1, help="How many (task, label) pairs to list.")] = 5,
    coverage: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="As asked for; without it a prediction set may end anywhere."),
    ] = None,
    abstain_level: Annotated[
        float, typer.Option(envvar="TOSCA_ABSTAIN_LEVEL", min=0.0, max=1.0, help="The server's.")
    ] = DEFAULT_ABSTAIN_LEVEL,
    device: DeviceOption = "auto",
    runtime: RuntimeOption = "auto",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Answer a picture again with the revision in a receipt, and compare; exit 1 when the answers differ.

    Example: curl --data-binary @bird.jpg localhost:8000/predict | tosca replay - bird.jpg
    """
    text = sys.stdin.read() if receipt == "-" else read_file(Path(receipt)).decode(errors="replace")
    given = read_given(text, index)
    listed = [top_k]
    if given.answer is not None:
        listed += [len(given.answer.alternatives) + 1, len(given.answer.prediction_set or ()) + 1]
    replayed = answer_again(
        ModelStore(store),
        given.receipt,
        read_file(picture),
        selection=choose(selection, SELECTIONS, "--selection"),
        task=task,
        top_k=max(listed),
        coverage=coverage,
        abstain_level=abstain_level,
        device=device,
        runtime=runtime,
    )
    answer = replayed.answer
    found = differences(given.answer, replayed) if given.answer else []
    if json:
        matches = not found if given.answer else None
        print_json({"matches": matches, "differences": found, "answer": asdict(answer)})
    else:
        out.print(f"revision {answer.receipt.revision}: {answer.task}/{answer.label} {answer.confidence:.6f}")
        for one in found:
            out.print(f"differs: {one}")
        if given.answer and not found:
            out.print("the answer holds")
    if found:
        raise typer.Exit(1)
