"""What a run tells when it is over: the closing table, sample answers, and a page that holds everything."""

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

from rlhf.plots import PLOTS, Curve, draw, read_curves
from rlhf.runlog import METRICS_FILE

MODELS = {"sft": "SFT", "ppo": "PPO", "dpo": "DPO"}
MISSING = "–"

Summary = Mapping[str, Any]
Sample = Mapping[str, Any]


class Measure(NamedTuple):
    """One row of the closing table: a field of every model's part of the summary, and how to read it."""

    field: str
    label: str
    meaning: str
    form: str = "{:.3f}"


MEASURES = (
    Measure("win_rate", "Better than SFT", "the judge finds it the better answer", "{:.1%}"),
    Measure("tie_rate", "As good as SFT", "the judge sees no difference", "{:.1%}"),
    Measure("lose_rate", "Worse than SFT", "the judge prefers SFT's answer", "{:.1%}"),
    Measure("judged", "Judged", "the judge's mean score: SnowNLP's from 0 negative to 1 positive"),
    Measure("length", "Answer length", "mean tokens an answer", "{:.1f}"),
    Measure("distinct_2", "Variety", "distinct-2: share of word pairs that are not repeats"),
    Measure(
        "heldout_nll", "Held-out NLL", "nats/token on unseen text; a rise is language forgotten"
    ),
    Measure("kl", "KL from SFT", "nats/token; how far training moved the model", "{:.4f}"),
)


def summary_table(summary: Summary) -> Table:
    """The closing table of a run, for the screen: a row a measure, a column a model."""
    models = [model for model in MODELS if model in summary]
    facts = "\n".join(f"{name}: {fact}" for name, fact in _facts(summary))
    table = Table(
        title="How the models compare on held-out prompts",
        caption=escape(facts),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("Measure")
    for model in models:
        table.add_column(MODELS[model], justify="right", no_wrap=True)
    table.add_column("What it means", style="dim")
    for answers, rows in _sections(summary, models):
        table.add_row(f"[bold]{answers}")
        for measure, cells in rows:
            table.add_row(f"  {measure.label}", *cells, measure.meaning)
        table.add_section()
    return table


def samples_table(samples: Sequence[Sample], count: int = 3) -> Table:
    """The answers to the first `count` prompts, for the screen, model below model."""
    table = Table(title="Sample answers", box=box.SIMPLE_HEAD, show_lines=False)
    table.add_column("Model", no_wrap=True)
    table.add_column("Text", overflow="fold")
    table.add_column("Judged", justify="right")
    for sample in samples[:count]:
        table.add_row("[bold]prompt", f"[bold]{escape(sample['prompt'])}")
        for model, name in MODELS.items():
            if model in sample:
                judged = _number(sample.get(f"{model}_judged"), "{:.2f}")
                table.add_row(f"  {name}", escape(sample[model]), judged)
        table.add_section()
    return table


def write_report(directory: Path) -> Path:
    """Write `report.html` from what a run left in `directory`, and return its path.

    Reads summary.json, metrics.jsonl, samples.json and recipe.json; what a run did not get to is left out. The
    page needs no other file: pictures are inside it.
    """
    summary = _read_json(directory / "summary.json", {})
    curves = read_curves(directory / METRICS_FILE)
    samples = _read_json(directory / "samples.json", [])
    recipe = _read_json(directory / "recipe.json", None)
    title = f"glm-jax: {html.escape(directory.resolve().name)}"
    sections = {
        "How the models compare": _html_comparison(summary),
        "Training": _html_plots(curves),
        "Answers to held-out prompts": _html_samples(samples),
        "Time": _html_time(summary),
        "Recipe": _html_recipe(recipe),
    }
    body = "".join(f"<h2>{name}</h2>\n{part}" for name, part in sections.items() if part)
    facts = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(fact)}</dd>"
        for name, fact in _facts(summary)
    )
    path = directory / "report.html"
    path.write_text(PAGE.format(title=title, style=STYLE, facts=facts, body=body), encoding="utf-8")
    return path


def _read_json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else form.format(value)


def _facts(summary: Summary) -> Iterable[tuple[str, str]]:
    """What stands beside the table: (name, sentence)."""
    if "parameters" in summary:
        yield "Model", f"{summary['parameters'] / 1e6:.2f} M parameters"
    if "layout" in summary:
        mesh = " x ".join(
            f"{axis} {size}" for axis, size in summary.get("mesh", {}).items() if size > 1
        )
        devices = summary.get("devices", 1)
        on = f"{devices} device{'' if devices == 1 else 's'}"
        if (processes := summary.get("processes", 1)) > 1:
            on += f" of {processes} processes"
        yield "Layout", f"{summary['layout']} on {on}{f' ({mesh})' if mesh else ''}"
    if "seed" in summary:
        yield "Seed", str(summary["seed"])
    if reward_model := summary.get("reward_model"):
        yield "Reward model", _reward_model_fact(reward_model)
    ppo = summary.get("ppo", {})
    if "reward_start" in ppo and "reward_end" in ppo:
        spread = _number(ppo.get("reward_start_se"), " ± {:.3f}")
        yield (
            "PPO reward",
            f"{ppo['reward_start']:.3f}{spread} before the first update, {ppo['reward_end']:.3f} at the end",
        )
    if wall := summary.get("wall_s"):
        yield "Time", f"{sum(wall.values()) / 60:.1f} minutes"


def _reward_model_fact(reward_model: Summary) -> str:
    if "from" in reward_model:
        return f"trained elsewhere: {reward_model['from']}"
    text = f"picks the answer people prefer in {reward_model['accuracy']:.1%}"
    if reward_model.get("accuracy_low") is not None:
        text += f" ({reward_model['accuracy_low']:.1%} to {reward_model['accuracy_high']:.1%})"
    text += (
        f" of {reward_model['num_pairs']:,} held-out pairs" if "num_pairs" in reward_model else ""
    )
    if reward_model.get("length_only_accuracy") is not None:
        text += f" (by length alone: {reward_model['length_only_accuracy']:.1%})"
    return text + (f"; grade: {reward_model['grade']}" if "grade" in reward_model else "")


def _sections(
    summary: Summary, models: Sequence[str]
) -> Iterable[tuple[str, list[tuple[Measure, list[str]]]]]:
    """(kind of answers, rows with a cell for each of `models`); rows and kinds that nobody measured are left out."""
    parts = [summary[model] for model in models]
    for answers, fields in (
        ("Sampled answers", parts),
        ("Greedy answers", [part.get("greedy", {}) for part in parts]),
    ):
        rows = [
            (measure, [_number(field.get(measure.field), measure.form) for field in fields])
            for measure in MEASURES
            if any(field.get(measure.field) is not None for field in fields)
        ]
        if rows:
            yield answers, rows


def _html_comparison(summary: Summary) -> str:
    models = [model for model in MODELS if model in summary]
    lines = []
    for answers, rows in _sections(summary, models):
        lines.append(f'<tr class="section"><th colspan="{len(models) + 2}">{answers}</th></tr>')
        for measure, cells in rows:
            numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
            meaning = f'<td class="meaning">{html.escape(measure.meaning)}</td>'
            lines.append(f"<tr><td>{html.escape(measure.label)}</td>{numbers}{meaning}</tr>")
    if not lines:
        return ""
    heads = "".join(f'<th class="number">{MODELS[model]}</th>' for model in models)
    head = f"<thead><tr><th>Measure</th>{heads}<th>What it means</th></tr></thead>"
    return f"<table>{head}<tbody>{''.join(lines)}</tbody></table>"


def _html_plots(curves: Mapping[str, Mapping[str, Curve]]) -> str:
    pictures = []
    for plot in PLOTS:
        drawn = {
            name: curves[plot.stage][metric]
            for metric, name in plot.metrics.items()
            if metric in curves.get(plot.stage, {})
        }
        if drawn:
            pictures.append((plot.title, draw(plot, drawn)))
    return html_pictures(pictures)


def html_pictures(pictures: Sequence[tuple[str, bytes]]) -> str:
    """(title, PNG) side by side, inside the page."""
    images = (
        f'<img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(data).decode("ascii")}">'
        for title, data in pictures
    )
    return f'<div class="plots">{"".join(images)}</div>' if pictures else ""


def _html_samples(samples: Sequence[Sample]) -> str:
    cards = []
    for sample in samples:
        answers = []
        for model, name in MODELS.items():
            if model in sample:
                judged = _number(sample.get(f"{model}_judged"), "judged {:.2f}")
                answers.append(
                    f'<div class="answer"><h4>{name} <span>{judged}</span></h4>'
                    f'<p lang="zh">{html.escape(sample[model]) or MISSING}</p></div>'
                )
        prompt = f'<p class="prompt" lang="zh">{html.escape(sample["prompt"])}</p>'
        cards.append(
            f'<div class="sample">{prompt}<div class="answers">{"".join(answers)}</div></div>'
        )
    return "".join(cards)


def _html_time(summary: Summary) -> str:
    speeds = summary.get("tokens_per_s", {})
    rows = "".join(
        f'<tr><td>{html.escape(stage)}</td><td class="number">{seconds:,.1f}</td>'
        f'<td class="number">{_number(speeds.get(stage), "{:,.0f}")}</td></tr>'
        for stage, seconds in summary.get("wall_s", {}).items()
    )
    head = '<tr><th>Stage</th><th class="number">Seconds</th><th class="number">Tokens/s</th></tr>'
    return (
        f'<table class="narrow"><thead>{head}</thead><tbody>{rows}</tbody></table>' if rows else ""
    )


def _html_recipe(recipe: Any) -> str:
    if recipe is None:
        return ""
    text = html.escape(json.dumps(recipe, ensure_ascii=False, indent=2))
    return f"<details><summary>Every setting of this run</summary><pre>{text}</pre></details>"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<dl>{facts}</dl>
{body}
</body>
</html>
"""

STYLE = """
body { max-width: 70rem; margin: 2.5rem auto; padding: 0 1.5rem; color: #1f2933; background: #fff;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.7rem; margin-bottom: 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid #e4e7eb; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0; }
dt { color: #52606d; }
dd { margin: 0; }
table { border-collapse: collapse; width: 100%; }
table.narrow { width: auto; min-width: 24rem; }
th { text-align: left; font-weight: 600; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid #e4e7eb; }
tr.section th { padding-top: 1rem; color: #2563eb; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.meaning { color: #52606d; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
.plots img { width: 100%; }
.sample { margin: 1rem 0; border: 1px solid #e4e7eb; border-radius: .5rem; overflow: hidden; }
.prompt { margin: 0; padding: .6rem 1rem; background: #f5f7fa; font-weight: 600; white-space: pre-wrap; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); }
.answer { padding: .6rem 1rem; }
.answer h4 { margin: 0; font-size: .85rem; }
.answer h4 span { margin-left: .5rem; font-weight: 400; color: #52606d; }
.answer p { margin: .3rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; }
pre { padding: 1rem; overflow-x: auto; font-size: .85rem; background: #f5f7fa; border-radius: .5rem; }
@media print { .sample, .plots img { break-inside: avoid; } }
"""
