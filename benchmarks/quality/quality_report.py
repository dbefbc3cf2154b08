"""The quality benchmark's report: tables as the paper prints them, two plots, and what the numbers say and do not."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from quality_plan import Bench, Run, best_rate, candidates, system_of
from quality_run import Record, RunLog
from training_run import mean_and_error

from ept.data.metrics import measure
from ept.plots import heat_map

#: Names in print, the order of the table's rows.
TITLES = {
    "lora": "LoRA",
    "lora-per-task": "one LoRA a task, rank 8",
    "lora-per-task-small": "one LoRA a task, EPT's parameters",
    "moelora": "MOELoRA",
    "more": "MoRE",
    "mixlora": "MixLoRA",
    "dcft": "DCFT",
    "tucka": "TuckA",
    "ept": "EPT",
}

FULL = "EPT, mixed pyramid"

#: The paper's mean over eight GLUE tasks (T5-base, tables 1 and 4).
PUBLISHED = {
    FULL: 87.0,
    "zero-init-seed": 86.2,
    "no-top-k": 86.0,
    "no-alp-scaling": 86.3,
    "no-contrastive-loss": 86.5,
    "all-2": 85.8,
    "all-8": 86.1,
}


def _cell(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"


def adapter_parameters(record: Record) -> int:
    """Trained numbers of the adapter: all but the tasks' heads."""
    return sum(count for name, count in record["parameters"].items() if name != "other")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Results:
    """The finished runs of a benchmark, by what the report shows."""

    def __init__(self, bench: Bench, log: RunLog) -> None:
        self.bench, self._log = bench, log
        chosen = [m for m in TITLES if m in bench.methods and all(run in log for run in candidates(bench, m, log))]
        self.rates = {method: best_rate(bench, method, log) for method in chosen}
        self.finals = {method: self._final(method) for method in chosen}
        self.finals = {method: records for method, records in self.finals.items() if records}
        self.ablations: dict[str, list[Record]] = {}
        if "ept" in self.finals:
            found = {name: self._final("ept", name) for name in bench.ablations}
            self.ablations = {name: records for name, records in found.items() if records}

    def _final(self, method: str, ablation: str | None = None) -> list[Record]:
        bench, rate = self.bench, self.rates[method]
        runs = [Run("final", method, rate, seed, bench.steps, ablation) for seed in range(bench.seeds)]
        # Seed by seed, so that records of two methods at one place in their lists are of one seed.
        return [{**self._log[run], "steps": run.steps} for run in takewhile(self._log.__contains__, runs)]

    def selection(self, method: str) -> dict[float, float]:
        """Mean score on the held-out rows by learning rate."""
        return {run.lr: self._log[run]["mean"] for run in candidates(self.bench, method, self._log)}

    @property
    def any(self) -> Record:
        return next(iter(self.finals.values()))[0]


def _score_row(title: str, records: Sequence[Record], tasks: Sequence[str], extra: Sequence[str]) -> list[str]:
    scores = [[record["scores"][task] for record in records] for task in tasks]
    means = [record["mean"] for record in records]
    return [title, *extra, *map(_cell, scores), _cell(means), str(len(records))]


def main_table(results: Results) -> str:
    """Parameters per task, every task, the mean over tasks; mean and standard error over the seeds."""
    tasks = list(results.any["scores"])
    heads = [
        "method",
        "rate",
        "parameters / task",
        *(f"{t} ({results.any['metrics'][t]})" for t in tasks),
        "mean",
        "seeds",
    ]
    rows = [["constant answer", "", "", *(f"{results.any['baseline'][task]:.3f}" for task in tasks), "", ""]]
    for method, records in results.finals.items():
        count = f"{adapter_parameters(records[0]) / len(tasks):,.0f}"
        rows.append(_score_row(TITLES[method], records, tasks, [f"{results.rates[method]:g}", count]))
    return _table(heads, rows)


def ablation_table(results: Results) -> str:
    """EPT (the paper's "mixed") and what it becomes without a part, the best mean first; beside it the paper's loss."""
    tasks, own = list(results.any["scores"]), results.finals["ept"]
    groups = {FULL: own, **results.ablations}
    order = sorted(groups, key=lambda name: -statistics.mean(record["mean"] for record in groups[name]))
    rows = []
    for name in order:
        lost = "" if name == FULL else _signed(_differences(groups[name], own))
        paper = "" if name == FULL else f"{(PUBLISHED[name] - PUBLISHED[FULL]) / 100:+.3f}"
        rows.append([*_score_row(name, groups[name], tasks, []), lost, paper])
    return _table(["variant", *tasks, "mean", "seeds", "minus EPT", "in the paper (GLUE)"], rows)


def rate_table(results: Results) -> str:
    """What each method's learning rate was chosen by."""
    found = {method: results.selection(method) for method in results.finals}
    longest = max(found, key=lambda method: len(found[method]))
    factors = [rate / system_of(longest).learning_rate for rate in found[longest]]
    rows = []
    for method, scores in found.items():
        cells = [f"{rate:g}: {score:.3f}" for rate, score in scores.items()]
        rows.append([TITLES[method], *cells, *[""] * (len(factors) - len(cells))])
    return _table(["method", *(f"default x {factor:g}" for factor in factors)], rows)


def _differences(records: Sequence[Record], others: Sequence[Record]) -> list[float]:
    """Of the means, seed by seed, as far as both have run: the same seed draws the same samples in the same order."""
    return [mine["mean"] - theirs["mean"] for mine, theirs in zip(records, others, strict=False)]


def _signed(differences: Sequence[float]) -> str:
    mean, error = mean_and_error(differences)
    return f"{mean:+.3f} (" + ("one seed)" if math.isnan(error) else f"± {error:.3f} over {len(differences)} seeds)")


def _resampled(records: Sequence[Record], others: Sequence[Record], draws: int = 200) -> float:
    """Standard error of the difference of two methods' means that comes from the validation rows (bootstrap).

    Both answer the same drawn rows of a task, and so do all seeds. NaN where a run kept no answers.
    """
    pairs = list(zip(records, others, strict=False))
    if not all(record.get("answers") for pair in pairs for record in pair):
        return math.nan
    random = np.random.default_rng(0)
    names = list(pairs[0][0]["scores"])
    answers = [[{t: np.array(v) for t, v in record["answers"].items()} for record in pair] for pair in pairs]
    classes = {t: int(v[1].max()) + 1 for t, v in answers[0][0].items()}
    found = []
    for _ in range(draws):
        drawn = {t: random.integers(len(v[0]), size=len(v[0])) for t, v in answers[0][0].items()}
        means = [
            [np.mean([score(own[t][:, drawn[t]], record["metrics"][t], classes[t]) for t in names]) for own in pair]
            for pair, (record, _) in zip(answers, pairs, strict=True)
        ]
        found.append(np.mean([mine - theirs for mine, theirs in means]))
    return float(np.std(found, ddof=1))


def score(answers: np.ndarray, metric: str, num_labels: int | None = None) -> float:
    """A headline metric of ``[predictions, labels] [2, N]``; ``num_labels`` None: as many classes as there are."""
    predictions, labels = answers
    return measure(metric, predictions, labels, int(labels.max()) + 1 if num_labels is None else num_labels)


def power(results: Results, method: str) -> str:
    """The difference from EPT that these runs would have shown: two standard errors, of seeds and of rows."""
    own, records = results.finals["ept"], results.finals[method]
    _, seeds = mean_and_error(_differences(own, records))
    rows = _resampled(own, records)
    total = math.hypot(*(error for error in (seeds, rows) if not math.isnan(error)))
    parts = f"seeds {seeds:.3f}, validation rows " + ("not kept" if math.isnan(rows) else f"{rows:.3f}")
    return f"- {TITLES[method]}: standard errors of the difference: {parts}; seen from {2 * total:.3f} on."


def curve_table(results: Results) -> str:
    """Mean score over tasks and seeds after every so many steps."""
    groups = {TITLES[method]: records for method, records in results.finals.items()}
    groups |= {f"EPT, {name}": records for name, records in results.ablations.items()}
    curves = {name: _curve(records) for name, records in groups.items()}
    steps = sorted({step for curve in curves.values() for step in curve})
    rows = [[name, *(_cell(curve[step]) if step in curve else "" for step in steps)] for name, curve in curves.items()]
    return _table(["method", *(f"{step:,}" for step in steps)], rows)


def _curve(records: Sequence[Record]) -> dict[int, list[float]]:
    """Means over the tasks, one a seed, by step; the end of a run is its last point."""
    curve: dict[int, list[float]] = {}
    for record in records:
        points = {int(step): statistics.mean(scores.values()) for step, scores in record.get("curve", {}).items()}
        for step, mean in {**points, record["steps"]: record["mean"]}.items():
            curve.setdefault(step, []).append(mean)
    return curve


def _plot_curves(results: Results, path: Path) -> Path:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, records in results.finals.items():
        curve = sorted(_curve(records).items())
        means = [statistics.mean(values) for _, values in curve]
        style = {"color": "tab:red", "linewidth": 2.2, "zorder": 3} if method == "ept" else {"linewidth": 1.2}
        axes.plot([step for step, _ in curve], means, marker="o", markersize=3, label=TITLES[method], **style)
    axes.set(xlabel="steps", ylabel="mean score over tasks")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def verdicts(results: Results) -> list[str]:
    """How EPT's mean compares with every other method's."""
    lines, own = [], results.finals["ept"]
    for method, records in results.finals.items():
        if method == "ept":
            continue
        fewer, more = adapter_parameters(own[0]), adapter_parameters(records[0])
        ahead = _signed(_differences(own, records))
        lines.append(f"- {TITLES[method]}: EPT {ahead} at {fewer / more:.2f} times its parameters.")
    return lines


def beside_the_constant(results: Results) -> str:
    """Which methods do not beat the constant answer on a task where LoRA does, by their means."""
    constant, lora = results.any["baseline"], results.finals["lora"]

    def mean(records: Sequence[Record], task: str) -> float:
        return statistics.mean(record["scores"][task] for record in records)

    learned = [task for task, score in constant.items() if mean(lora, task) > score]
    behind = [
        f"{TITLES[method]} on {task} ({mean(records, task):.3f} against {constant[task]:.3f})"
        for method, records in results.finals.items()
        for task in learned
        if mean(records, task) <= constant[task]
    ]
    return (
        f"Mean above the constant answer: LoRA on {', '.join(learned) or 'no task'}; every other method on the same, "
        f"but for {', '.join(behind) or 'none'}."
    )


def _plot_parameters(results: Results, path: Path) -> Path:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    tasks = len(results.any["scores"])
    for method, records in results.finals.items():
        mean, error = mean_and_error([record["mean"] for record in records])
        x = adapter_parameters(records[0]) / tasks
        axes.errorbar(x, mean, yerr=0 if math.isnan(error) else error, fmt="o", capsize=3)
        axes.annotate(TITLES[method], (x, mean), textcoords="offset points", xytext=(6, 4))
    axes.set(xscale="log", xlabel="trained adapter parameters per task", ylabel="mean score over tasks")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


def _plot_experts(use: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    figure = Figure(figsize=(5, 0.5 * len(use) + 1.5), layout="constrained")
    axes = figure.subplots()
    scales = list(next(iter(use.values())))
    values = [[weights[scale] for scale in scales] for weights in use.values()]
    image = heat_map(axes, np.array(values), highest=1.0)
    axes.set_xticks(range(len(scales)), [f"scale {scale}" for scale in scales])
    axes.set_yticks(range(len(use)), list(use))
    figure.colorbar(image, label="mean gate over the layers")
    figure.savefig(path, dpi=120)
    return path


def write_report(folder: Path, bench: Bench, log: RunLog, command: str) -> list[Path]:
    """Write ``report.md``, its plots and ``summary.json`` of the runs in ``log``; the paths written.

    Methods whose rate is not chosen yet, and seeds that have not run, are left out; with nothing to show, nothing is
    written.
    """
    results = Results(bench, log)
    if not results.finals:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    written = [_plot_parameters(results, folder / "parameters.png")]
    sections = [f"# Quality, suite {bench.suite}", _setting(results, command), main_table(results)]
    sections.append("![Parameters and score](parameters.png)")
    if "lora" in results.finals:
        sections.append(beside_the_constant(results))
    if "ept" in results.finals:
        sections += ["## EPT beside the others", "\n".join(verdicts(results))]
        if bench.seeds > 1:
            others = [method for method in results.finals if method != "ept"]
            lines = [power(results, method) for method in others]
            sections += ["### What these runs could have seen", "\n".join(lines)]
        written.append(_plot_experts(results.finals["ept"][0]["expert_use"], folder / "experts.png"))
        sections += ["## Which scales each task uses (EPT, seed 0)", "![Expert use by task](experts.png)"]
    if bench.curve_steps is not None:
        written.append(_plot_curves(results, folder / "curves.png"))
        sections += ["## Score over steps", "![Score over steps](curves.png)", curve_table(results)]
    if results.ablations:
        sections += ["## Ablations", ablation_table(results)]
    if bench.rate is None:
        sections += [
            "## Learning rates",
            f"Mean score on the held-out training rows after {bench.selection_steps} steps, seed 0; the best rate is "
            f"the one reported above, after {bench.steps}. Where the largest of the grid was the best, twice that was "
            "tried, too.",
            rate_table(results),
        ]
    sections += ["## What this cannot show", _limits(bench)]
    report = folder / "report.md"
    report.write_text("\n\n".join(sections) + "\n")
    summary = folder / "summary.json"
    summary.write_text(json.dumps(_summary(results), indent=1) + "\n")
    return [report, summary, *written]


def _setting(results: Results, command: str) -> str:
    bench, record = results.bench, results.any
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    scored = {task: min(rows, bench.eval_limit or rows) for task, (_, rows) in record["rows"].items()}
    rows = ", ".join(f"{task} {record['rows'][task][0]:,} + {count:,}" for task, count in scored.items())
    return (
        f"`{command}`\n\n{bench.model}, {bench.steps} steps of {bench.batch_size} samples, {bench.max_length} tokens, "
        f"{'bf16 autocast' if bench.bf16 else 'fp32'}; {record['device']}; {versions}. "
        f"Rows (training + scored): {rows}. Every task is drawn equally often. "
        "Parameters: the adapter's, without the tasks' heads, over the number of tasks."
    )


def _limits(bench: Bench) -> str:
    return (
        f"One model, {bench.steps} steps, {bench.seeds} seed{'s' * (bench.seeds > 1)}: small models on small budgets "
        "may rank methods differently from the paper. The standard error is over seeds and leaves out the validation "
        "rows' own (about 0.02 for a few hundred rows). A difference below two standard errors is no difference."
    )


def _summary(results: Results) -> dict[str, Any]:
    def of(records: Sequence[Record]) -> dict[str, Any]:
        tasks = {task: mean_and_error([r["scores"][task] for r in records])[0] for task in records[0]["scores"]}
        mean, error = mean_and_error([record["mean"] for record in records])
        return {
            "parameters": adapter_parameters(records[0]),
            "scores": tasks,
            "mean": mean,
            "standard_error": None if math.isnan(error) else error,
            "seeds": len(records),
        }

    return {
        "methods": {m: {"lr": results.rates[m], **of(records)} for m, records in results.finals.items()},
        "ablations": {name: of(records) for name, records in results.ablations.items()},
    }
