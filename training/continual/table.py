"""The summary of a results file for people."""

from training.continual.registry import METHODS
from training.continual.results import BenchmarkResults

TABLE_WIDTH = 132  # below it the cells would be broken
_COLUMNS = (  # title, figure, factor and decimals to show it with
    ("last %", "last_accuracy", 100.0, 1),
    ("avg %", "average_accuracy", 100.0, 1),
    ("task %", "selection_accuracy", 100.0, 1),
    ("given %", "accuracy_given_task", 100.0, 1),
    ("forget %", "forgetting", 100.0, 1),
    ("ECE", "ece", 1.0, 3),
    ("worst ECE", "worst_task_ece", 1.0, 3),
    ("unrelated %", "unrelated_accuracy", 100.0, 1),
    ("AUROC", "auroc", 1.0, 3),
    ("FPR95", "fpr95", 1.0, 3),
    ("MB a task", "bytes_per_task", 1e-6, 2),
    ("s a task", "learn_s_per_task", 1.0, 2),
)


def results_table(results: BenchmarkResults) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: means over the seeds, with the deviation of the last accuracy. Figures nobody has are
    left out."""
    columns = [one for one in _COLUMNS if any(one[1] in summary for summary in results.summary.values())]
    rows = []
    for method in (name for name in METHODS if name in results.summary):
        summary = results.summary[method]
        last = summary["last_accuracy"]
        cells = [
            f"{summary[name].mean * factor:.{digits}f}" if name in summary else "–"
            for _, name, factor, digits in columns
        ]
        rows.append([method, str(last.num_seeds), *cells, f"{100.0 * last.deviation:.1f}"])
    return ["method", "seeds", *(title for title, *_ in columns), "± last"], rows
