"""The summary of a results file for people."""

from rich.table import Column, Table

from training.continual.registry import METHODS
from training.continual.results import BenchmarkResults

TABLE_WIDTH = 132  # below it the names of methods would be cut
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


def results_table(results: BenchmarkResults) -> Table:
    """Means over the seeds, with the deviation of the last accuracy; figures nobody has are left out."""
    columns = [one for one in _COLUMNS if any(one[1] in summary for summary in results.summary.values())]
    table = Table(Column("method", no_wrap=True), "seeds", *(title for title, *_ in columns), "± last")
    for method in (name for name in METHODS if name in results.summary):
        summary = results.summary[method]
        last = summary["last_accuracy"]
        cells = [
            f"{summary[name].mean * factor:.{digits}f}" if name in summary else "–"
            for _, name, factor, digits in columns
        ]
        table.add_row(method, str(last.num_seeds), *cells, f"{100.0 * last.deviation:.1f}")
    return table
