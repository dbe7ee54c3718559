"""`trl-lopd report`: a run as one HTML file that opens from disk, with its rollouts token by token.

Gathered here as text and numbers, laid out by `report.html`, where Jinja escapes every text. The rollouts are columns
of small integers and one JSON of texts, compressed and in base64, which `report.js` unpacks and draws a page at a
time: nothing that a model wrote is ever part of the markup.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import math
import re
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from datasets import Dataset, disable_progress_bars
from markupsafe import Markup
from transformers.trainer_utils import get_last_checkpoint

from ... import __version__
from ...effopd.callback import DIRECTORY, HISTORY
from ...errors import TableError
from ...generation.teachers import LocalTeacher, RowError
from ...identity.cards import load_table, read_model_card, record_of
from ...identity.consistency import written_for
from ...identity.fingerprint import fingerprint_teacher, same_teacher
from ...identity.stamp import fingerprint_or_none
from ...models import load_model
from ...names import as_name
from ...table.schema import (
    RESIDUAL,
    TOPK_COLUMNS,
    TRAINED_ROWS,
    TableRows,
    column_counts,
    row_hashes,
    rows_of_each,
    validate_table,
)
from ..inspect import ADVANTAGE_CLIP, find_tokenizer, visible
from .charts import curves, marks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Splits of a table that are seldom trained on.
_HELD_OUT = ("test", "validation", "eval")
# The teacher's tokens that the report keeps of each position.
_TOP = 5
# Log-probabilities are kept in thousandths of a nat.
_LOWEST, _MINUS_INF = -32767, -32768
# Colours of teachers in `report.css`; the next teachers have the same again.
_TONES = 8
# Lightning OPD measures importance weights of this mean, with a standard deviation below this.
_PAPER_MEAN, _PAPER_STD = 0.94, 0.1

# Title, unit, the name of what is logged, and a range to draw behind it.
_CURVES = (
    ("Loss", "the objective", "loss", None),
    ("Reverse KL on the stored top-k", "nats a token", "reverse_kl_topk", None),
    ("Advantage, mean", "nats", "advantage/mean", None),
    ("Advantage, standard deviation", "nats", "advantage/std", None),
    ("Student’s first choice is the teacher’s", "share of tokens", "top1_agreement", None),
    ("Entropy of the student", "nats", "entropy", None),
    ("Gradient norm", "", "grad_norm", None),
    ("Learning rate", "", "learning_rate", None),
)
_WEIGHTS = (
    ("Mean", "", "importance_weight/mean", (_PAPER_MEAN - _PAPER_STD, _PAPER_MEAN + _PAPER_STD)),
    ("Standard deviation", "", "importance_weight/std", (0.0, _PAPER_STD)),
    ("Effective sample size", "", "importance_weight/ess", None),
    ("Largest", "", "importance_weight/max", None),
)

# Shown even where they are the defaults.
_SETTINGS = (
    *("loss_type", "beta", "loss_aggregation", "advantage_clip", "ratio_clip"),
    *("teacher_consistency", "max_completion_length"),
    *("learning_rate", "lr_scheduler_type", "weight_decay", "max_steps", "num_train_epochs", "seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
)
# Paths of a machine, and a block that is seldom set.
_NOT_SHOWN = (
    *("output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "hub_model_id", "accelerator_config"),
    "wandb_run",
)


def write_report(
    run: str | Path,
    *,
    table: str | Path | None = None,
    split: str | None = None,
    student: str | Path | None = None,
    rows: int = 100,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """
    Writes a run as one HTML file that needs no network.

    Args:
        run (`str` or `Path`): Directory that an [`OfflineOPDTrainer`] wrote. What is missing in it is taken from its
            last checkpoint.
        table (`str` or `Path`, *optional*): Directory, parquet file or Hub id of the run's table, for the rollouts,
            which the run's model scores again. By default those that the run was not trained on, as the run's
            `trained_rows.npy` says; without it those of the split `test`, `validation` or `eval`, if there is one.
        split (`str`, *optional*): The split of the table to show, all of its rows.
        student (`str` or `Path`, *optional*): Directory or Hub id of the student as it was before training, which
            scores them too. Without it `ref_logprobs` stand for it: the policy that sampled the rollouts.
        rows (`int`, *optional*, defaults to `100`): Rollouts, drawn at random if there are more: the worst rows alone
            would look better after any training.
        output (`str` or `Path`, *optional*): The file. Defaults to `report.html` in `run`.

    Returns:
        `dict`: `output`, `bytes`, `rollouts`, `tokens` and `warnings`, what the reader of the report is warned of.

    Raises:
        FileNotFoundError: If something named is not there.
        TableError: If rows are not valid, have no teacher's scores, or do not fit the model.
        ValueError: If the directory holds nothing of a run, or the rollouts can be coloured neither before nor after.
    """
    run, table, student = Path(run), None if table is None else str(table), as_name(student)
    if not run.is_dir():
        what = "is no directory" if run.exists() else "is not there"
        raise FileNotFoundError(f"{run} {what}: a report is made of the directory that a training run wrote.")
    if rows < 1:
        raise ValueError(f"`rows` is 1 or more, not {rows}.")
    for option, given in (("student", student), ("split", split)):
        if given is not None and table is None:
            raise ValueError(f"`{option}` is for rows of a table: give `table` too.")
    of = _Run.read(run)
    warnings = list(of.warnings())
    rollouts = None
    if table is not None:
        rollouts = _rollouts(of, _Source(table, split, rows, student))
        warnings += rollouts.pop("warnings")
    # A teacher has one colour in all curves, and beside its rollouts.
    named = {*_teachers_of(of.logs), *(rollouts["of_teachers"] if rollouts else ())}
    tones = {name: f"chart-c-t{i % _TONES}" for i, name in enumerate(sorted(named))}
    content = {
        "name": run.resolve().name,
        "version": __version__,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "warnings": warnings,
        "facts": list(_facts(of.card, of.state, of.settings, rollouts)),
        "evaluations": of.evaluations,
        "rollouts": rollouts,
        "tones": tones,
        "has_weights": of.model is not None,
        "has_state": bool(of.logs),
        "curves": list(_charts(of.logs, _CURVES, tones)),
        "weights": list(_charts(of.logs, _WEIGHTS, tones)),
        "drift": _drift(of.logs),
        "logs": _log_table(of.logs),
        "searches": _searches([] if of.searches_are_older else of.searches, of.search_summary),
        "lineage": _lineage(of.card, run.resolve().name),
        "settings": _settings(of.settings),
        "versions": _versions(of.model or run, of.card),
    }
    text = _render(content)
    output = run / "report.html" if output is None else Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    counts = {name: rollouts[name] if rollouts else 0 for name in ("shown", "tokens")}
    return {
        "output": str(output),
        "bytes": output.stat().st_size,
        "rollouts": counts["shown"],
        "tokens": counts["tokens"],
        "warnings": warnings,
    }


@dataclasses.dataclass
class _Run:
    """What a training run left behind.

    Attributes:
        path: its directory.
        model: the directory of its weights, if there are any.
        card: of the model, what the library wrote.
        state: of the trainer.
        logs: entries of the state that have a step.
        settings: arguments of the training.
        trained: numbers of the rows that it was trained on.
        evaluated: files of evaluations and what is in them.
        evaluations: tables of them and of the comparison of `examples/train.py`.
        searches, search_summary: of EffOPD.
    """

    path: Path
    model: Path | None
    card: dict[str, Any]
    state: dict[str, Any] | None
    logs: list[dict[str, Any]]
    settings: dict[str, Any]
    trained: np.ndarray | None
    evaluated: list[tuple[Path, dict[str, Any]]]
    evaluations: list[dict[str, Any]]
    searches: list[dict[str, Any]]
    search_summary: dict[str, Any] | None

    @classmethod
    def read(cls, run: Path) -> _Run:
        """What is missing in the directory is taken from its last checkpoint."""
        last = get_last_checkpoint(str(run))
        places = [run, *([Path(last)] if last else [])]
        model = next((place for place in places if any(place.glob("*.safetensors"))), None)
        card = read_model_card(model or run)
        state = _json_of(places, "trainer_state.json")
        entries = []
        if state is not None:
            step, entries = state.get("global_step"), state.get("log_history")
            if not (isinstance(step, int) and isinstance(entries, list) and all(isinstance(e, dict) for e in entries)):
                raise _of_another_form(
                    _find(places, "trainer_state.json"), f"its step is {step!r:.80}, its logs are {entries!r:.80}"
                )
        paths = sorted(run.glob("evaluations/*/metrics.json"))
        evaluated = [(path, _json_of([path.parent], path.name)) for path in paths]
        evaluations = [*_comparison(run), *_metrics(evaluated)]
        history = _json_of([run], HISTORY) or {}
        searches = history.get("searches") or _json_of(places, f"{DIRECTORY}/history.json", list) or []
        if not (card.get("opd_rounds") or state is not None or evaluations or searches):
            raise ValueError(
                f"{run} holds nothing of a run: no card of `OfflineOPDTrainer`, no trainer_state.json, no "
                f"{HISTORY}, no evaluations. Name the `output_dir` of the training."
            )
        settings = _json_of(places, "training_args.json") or {}
        return cls(
            run,
            model,
            card,
            state,
            [entry for entry in entries if "step" in entry],
            settings,
            _array_of(places, TRAINED_ROWS),
            evaluated,
            evaluations,
            searches,
            history.get("summary"),
        )

    @property
    def searches_are_older(self) -> bool:
        rounds = self.card.get("opd_rounds")
        return bool(self.searches and rounds and "effopd" not in rounds[-1])

    def warnings(self) -> Iterator[str]:
        """What in the directory is not of the same run."""
        own = self.model and fingerprint_or_none(self.model, "The card is not held against the weights")
        if own and self.card and not written_for(self.card, own.id):
            yield "The model’s card was not written for these weights: what it says counts as declared."
        if self.searches_are_older:
            yield "The searches of EffOPD in this directory are an earlier run’s, and are left out."
        for path, found in self.evaluated:
            name, fingerprint = path.parent.name, found.get("fingerprint")
            if not fingerprint:
                yield f"The evaluation {name} does not say of which weights it is."
            elif own and not same_teacher(own.id, str(fingerprint)):
                yield f"The evaluation {name} is of other weights than those in this directory: {fingerprint}."


def _render(content: dict[str, Any]) -> str:
    here = files("trl_lopd.evaluation.report")
    script, style = ((here / f"report.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))

    def digest(text: str) -> Markup:
        return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")

    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        # Names and values are from files that others wrote: nothing invisible in them, nothing that turns text around.
        finalize=lambda value: value if not isinstance(value, str) or hasattr(value, "__html__") else visible(value),
    )
    environment.filters["number"] = _number
    template = environment.from_string((here / "report.html").read_text(encoding="utf-8"))
    return template.render(
        content,
        script=Markup(script),
        style=Markup(style),
        script_digest=digest(script),
        style_digest=digest(style),
    )


def _number(value: Any) -> str:
    """A value of a log or an evaluation, for a person."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value) if isinstance(value, str | bool) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, int) or not math.isfinite(value) or value == 0:
        return f"{value:,g}" if value == 0 else f"{value:,}"
    # Trailing zeros too: values stand below one another.
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}" if abs(value) >= 1e-4 else f"{value:.2e}"


def _find(places: list[Path], name: str) -> Path | None:
    """The file of this name in the first of these directories that has it."""
    return next((place / name for place in places if (place / name).is_file()), None)


def _of_another_form(path: Path | None, why: str) -> ValueError:
    return ValueError(f"{path} has not the form that training writes: {why}.")


def _json_of(places: list[Path], name: str, kind: type = dict) -> Any:
    """The content of a JSON file, of this type, in the first of these directories that has it, `None` if none has."""
    path = _find(places, name)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, kind):
        raise _of_another_form(path, f"it holds {content!r:.80}")
    return content


def _array_of(places: list[Path], name: str) -> np.ndarray | None:
    """The array in the file of this name, `None` if there is none."""
    path = _find(places, name)
    if path is None:
        return None
    try:
        return np.load(path)
    except (ValueError, EOFError, OSError):
        raise _of_another_form(path, "it holds no array of numbers") from None


# ---- What the run came to ----


def _facts(
    card: dict[str, Any], state: dict[str, Any] | None, settings: dict[str, Any], rollouts: dict[str, Any] | None
) -> Iterator[tuple]:
    """The few numbers at the top: a label, a value, and what it was before."""
    rounds = card.get("opd_rounds") or []
    if rounds:
        yield "objective", str(rounds[-1].get("objective")), None
        yield "teacher consistency", str(rounds[-1].get("teacher_consistency")), None
        if rounds[-1].get("rows"):
            yield "rollouts trained on", f"{rounds[-1]['rows']:,}", None
    if state:
        best = state.get("best_global_step") if settings.get("load_best_model_at_end") else None
        last = state["global_step"] if best is None else best
        yield "steps", f"{last:,}", None if best is None else f"the best of {state['global_step']:,}"
        evaluated = [entry for entry in state["log_history"] if entry.get("eval_reverse_kl_topk") is not None]
        values = [entry["eval_reverse_kl_topk"] for entry in evaluated if entry.get("step", 0) <= last]
        if values:
            before = f"first logged {values[0]:.4f}" if len(values) > 1 else None
            yield "reverse KL at evaluation", f"{values[-1]:.4f}", before
    if rollouts and {"before", "after"} <= rollouts["disagreement"].keys():
        before, after = (rollouts["disagreement"][name] for name in ("before", "after"))
        yield "mean |advantage| below", f"{after:.3f}", f"before {before:.3f}"


def _comparison(run: Path) -> Iterator[dict[str, Any]]:
    """What `examples/train.py` measured."""
    rows = _json_of([run], "report.json", list)
    if rows is None:
        return
    titles = {
        "fresh": "reverse KL, fresh rollouts (nats a sequence)",
        "held_out": "reverse KL on the stored top-k (nats a token)",
    }
    try:
        columns = [name for name in dict.fromkeys(key for row in rows for key in row) if not name.endswith("_se")]
        cells = [[_measured(row.get(name), se=row.get(f"{name}_se")) for name in columns] for row in rows]
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{run}/report.json has not the form that examples/train.py writes: {error!r}.") from error
    columns = [titles.get(name, name) for name in columns]
    yield {"title": "Before and after", "columns": columns, "rows": cells, "settings": {}}


def _metrics(evaluated: list[tuple[Path, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """What `trl-lopd evaluate` measured."""
    for path, found in evaluated:
        try:
            rows = [[name, _measured(**metric)] for name, metric in found["metrics"].items()]
            title = f"{found['benchmark']}, {Path(found['model']).name}"
            settings = dict(found.get("settings") or {})
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} has not the form of an evaluation, benchmark, model, settings and metrics, each with its "
                f"value: {error!r}."
            ) from error
        yield {"title": title, "columns": ["metric", "value"], "rows": rows, "settings": settings}


def _measured(value: Any, ci: list[float] | None = None, se: float | None = None, **_: Any) -> str:
    if ci is not None:
        return f"{_number(value)} [{_number(ci[0])}, {_number(ci[1])}]"
    if se is None:
        return _number(value)
    # Two digits of an error say all there is to say, and as many places of the value.
    places = max(0, 1 - math.floor(math.log10(se))) if se > 0 else 4
    return f"{value:,.{places}f} ± {se:.{places}f}"


def _log_table(logs: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that was logged, a row a log."""
    columns = list(dict.fromkeys(["step", *(key for entry in logs for key in entry)]))
    return {"columns": columns, "rows": [[entry.get(name) for name in columns] for entry in logs]}


def _drift(logs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Where the importance weights leave the range that the paper measured."""
    seen = [entry for entry in logs if "importance_weight/mean" in entry and "importance_weight/std" in entry]
    if not seen:
        return None
    outside = [
        entry
        for entry in seen
        if not abs(entry["importance_weight/mean"] - _PAPER_MEAN) <= _PAPER_STD
        or not entry["importance_weight/std"] <= _PAPER_STD
    ]
    first = {
        name: (outside or seen[-1:])[0][key]
        for name, key in (("step", "step"), ("mean", "importance_weight/mean"), ("std", "importance_weight/std"))
    }
    return {"logs": len(seen), "outside": len(outside), "first": first}


def _settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    from ...training.config import OfflineOPDConfig

    defaults = {}
    for field in dataclasses.fields(OfflineOPDConfig):
        made = field.default_factory is not dataclasses.MISSING
        defaults[field.name] = field.default_factory() if made else field.default
    shown = [name for name in _SETTINGS if name in settings]
    shown += [
        name
        for name, value in settings.items()
        if name not in (*shown, *_NOT_SHOWN)
        and not name.endswith("_token")
        and value not in (defaults.get(name), [], {})
    ]
    return [
        (name, settings[name] if isinstance(settings[name], str) else json.dumps(settings[name])) for name in shown
    ]


def _versions(place: Path, card: dict[str, Any]) -> list[tuple[str, str]]:
    """Those that TRL's card says the model was trained with."""
    path = place / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.findall(r"^- (\w+): (\S+)$", text.partition("### Framework versions")[2], flags=re.MULTILINE)
    about = card.get("model") or {}
    return [
        *found,
        *((name, _number(about[name])) for name in ("architecture", "parameters", "dtype") if name in about),
    ]


# ---- Curves ----


def _teachers_of(logs: list[dict[str, Any]]) -> set[str]:
    """The teachers that evaluations have metrics of, with the name of the evaluated dataset if there are several."""
    keys = "|".join(re.escape(key) for _, _, key, _ in (*_CURVES, *_WEIGHTS))
    matches = (re.fullmatch(rf"eval_(.+)/(?:{keys})", name) for entry in logs for name in entry)
    return {match[1] for match in matches if match}


def _series(logs: list[dict[str, Any]], key: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """The curve of what training logs under a name, and those of its evaluations: of all rows, and of each teacher."""
    # The logs of a saved state are sorted by their names.
    named: dict[str, list[tuple[float, float]]] = {"training": [], "evaluation": []}
    for entry in logs:
        for name, value in entry.items():
            if not (isinstance(value, int | float) and math.isfinite(value)):
                continue
            if name == key:
                named["training"].append((entry["step"], value))
            elif match := re.fullmatch(rf"eval_(?:(.+)[_/])?{re.escape(key)}", name):
                named.setdefault(f"evaluation {match[1] or ''}".strip(), []).append((entry["step"], value))
    return [(name, points) for name, points in named.items() if points]


def _charts(logs: list[dict[str, Any]], wanted: tuple[tuple, ...], tones: dict[str, str]) -> Iterator[dict[str, Any]]:
    """What was logged of what is wanted, each as title, unit, drawing, and the last value of each curve."""
    for title, unit, key, band in wanted:
        if series := _series(logs, key):
            toned = [
                (name, tones.get(name.partition(" ")[2], f"chart-c{i}"), points)
                for i, (name, points) in enumerate(series)
            ]
            yield {
                "title": title,
                "unit": unit,
                "svg": curves([(tone, points) for _, tone, points in toned], band),
                "last": [(name, tone, points[-1][1]) for name, tone, points in toned],
            }


def _searches(searches: list[dict[str, Any]], summary: dict[str, Any] | None) -> dict[str, Any] | None:
    """The searches of EffOPD: what was tried, what was taken, as a table and as a picture."""
    if not searches:
        return None
    scales = sorted({float(scale) for search in searches for scale in search["scores"]})
    rows, points = [], {"tried": [], "taken": []}
    for search in searches:
        scores = {float(scale): score for scale, score in search["scores"].items()}
        taken = float(search["accepted"])
        rows.append(
            {
                "step": search["step"],
                "scores": [(scores.get(scale), scale == taken) for scale in scales],
                "accepted": search["accepted"],
                "more": [search[name] for name in ("p_value", "delta_cosine", "seconds")],
            }
        )
        for scale, score in scores.items():
            if math.isfinite(score):
                points["taken" if scale == taken else "tried"].append((search["step"], score))
    return {"scales": [f"{scale:g}" for scale in scales], "rows": rows, "summary": summary, "svg": marks(points)}


# ---- Lineage ----


def _lineage(card: dict[str, Any], name: str) -> list[tuple[str, str, str, int | None]]:
    """Teachers and checkpoints, oldest first: what each did, its id, how that is known, and rows."""
    if not card:
        return []
    lines = []

    def add(did: str, entries: list[dict[str, Any]] | None) -> None:
        lines.extend((did, e["id"], e.get("evidence", "declared"), e.get("rows")) for e in entries or ())

    add("wrote SFT data", card.get("sft_teachers"))
    for i, round in enumerate(card.get("opd_rounds") or (), start=1):
        how = [str(round["objective"])] if "objective" in round else []
        if "teacher_consistency" in round:
            how.append(f"teacher consistency: {round['teacher_consistency']}")
        lines.append((f"began round {i}" + f" ({'; '.join(how)})" * bool(how), str(round.get("student")), None, None))
        add("sampled rollouts", round.get("sampled_by") or [{"id": "not named", "evidence": "unknown"}])
        add("scored rollouts", round.get("teachers"))
    add("this model", [card.get("model") or {"id": name}])
    return lines


# ---- Rollouts ----


@dataclasses.dataclass(frozen=True)
class _Source:
    """The rollouts to show: a table, which of its splits, how many rows, and the student as it was before training."""

    table: str
    split: str | None
    rows: int
    student: str | None


def _rollouts(run: _Run, source: _Source) -> dict[str, Any]:
    """The rollouts as the script reads them, and what the page says of them."""
    disable_progress_bars()
    name, student, model = source.table, source.student, run.model
    table, split, candidates, seen = _candidates(name, source.split, run.trained)
    if model is None and student is None and "ref_logprobs" not in table.column_names:
        raise ValueError(
            "The run has no weights, the table no `ref_logprobs`: nothing says how likely the tokens were to a "
            "student. Name the student: `--student`."
        )
    if not len(table):
        raise TableError(f"{name} has no rows in {split!r}.")
    chosen = np.sort(candidates[np.random.default_rng(0).permutation(len(candidates))[: source.rows]])
    tokenizer, decoded_with = find_tokenizer(None, str(model or run.path), None, record_of(table), name)
    rows = table.select(chosen)
    try:
        # Scores of -inf are shown as such; any floor lets them pass.
        validate_table(rows, tokenizer, teacher_logprob_floor=-1.0)
    except TableError as error:
        raise TableError(f"{error} (Rows are counted among the {len(rows)} drawn of {split!r}.)") from None

    values = TableRows(rows).__getitems__(list(range(len(rows))))
    flat = {key: np.concatenate([row[key] for row in values]) for key in values[0] if key != "prompt_ids"}
    scores: dict[str, np.ndarray] = {"teacher": flat["teacher_logprobs"]}
    if student is not None:
        scores["before"] = _scored(student, values, chosen)
    if "ref_logprobs" in flat:
        scores["ref" if student is not None else "before"] = flat["ref_logprobs"]
    if model is not None:
        scores["after"] = _scored(str(model), values, chosen)
    shown = flat.get("completion_mask", slice(None))
    states = [key for key in ("before", "after") if key in scores]
    clip = run.settings.get("advantage_clip", ADVANTAGE_CLIP)
    advantage = {key: (scores["teacher"] - scores[key]).clip(-clip, clip)[shown] for key in states}
    sizes = np.array([len(row["completion_ids"]) for row in values])
    labels: list[dict[str, int]] = [{"row": int(row)} for row in chosen]
    of_teachers = {}
    for place, (teacher, indices) in enumerate(rows_of_each(TableRows(rows).teacher_ids).items()):
        is_of = np.repeat(np.isin(np.arange(len(rows)), indices), sizes)[shown]
        means = {key: float(np.abs(value[is_of]).mean()) for key, value in advantage.items()}
        of_teachers[teacher] = {"rows": len(indices), "disagreement": means}
        for i in indices:
            labels[i]["teacher"] = place
    packed = _packed(values, flat, scores, tokenizer, labels, clip)
    warnings = list(_mismatches(table, student, run.card))
    if seen:
        warnings.append(
            f"The run was trained on {seen:,} of the {len(candidates):,} rows that the rollouts are drawn from."
        )
    return {
        "data": packed,
        "of_teachers": of_teachers,
        "disagreement": {key: float(np.abs(value).mean()) for key, value in advantage.items()},
        "means": {key: float(value.mean()) for key, value in advantage.items()},
        "table": Path(name).name if Path(name).exists() else name,
        "split": split,
        "of": len(candidates),
        "in_split": len(table),
        # How many of them the run was trained on; `None` if nothing says so.
        "seen": seen,
        "shown": len(rows),
        "tokens": len(flat["completion_ids"]),
        "clip": clip,
        "sampler": student is None,
        "decoded": decoded_with is not None,
        "states": states,
        "warnings": warnings,
    }


def _packed(
    values: list[dict[str, np.ndarray]],
    flat: dict[str, np.ndarray],
    scores: dict[str, np.ndarray],
    tokenizer: PreTrainedTokenizerBase | None,
    labels: list[dict[str, int]],
    clip: float,
) -> dict[str, str]:
    """The columns that the script unpacks, as text. `labels` has the index of each row in the table, and the place of
    its teacher among those that are shown, if there are several."""
    texts = [text_pieces(tokenizer, [*row["prompt_ids"].tolist(), *row["completion_ids"].tolist()]) for row in values]
    known: dict[tuple[int, str], int] = {}
    tokens = [
        known.setdefault((token, text), len(known))
        for row, pieces in zip(values, texts, strict=True)
        for token, text in zip(row["completion_ids"].tolist(), pieces[len(row["prompt_ids"]) :], strict=True)
    ]
    columns = {key: _thousandths(value) for key, value in scores.items()}
    kept = 0
    if TOPK_COLUMNS[0] in flat:
        ids, logprobs = (flat[key] for key in TOPK_COLUMNS)
        order = np.argsort(-logprobs.astype(np.float32), axis=1, kind="stable")[:, :_TOP]
        ids, kept = np.take_along_axis(ids, order, 1), order.shape[1]
        unique, places = np.unique(ids, return_inverse=True)
        before = int(values[0]["prompt_ids"][0])
        indices = [
            known.setdefault((int(id), text_pieces(tokenizer, [before, int(id)])[1].replace("\ufffd", "")), len(known))
            for id in unique
        ]
        columns["topk"] = np.array(indices, np.uint32)[places.ravel()]
        columns["topk_logprobs"] = _thousandths(np.take_along_axis(logprobs, order, 1).ravel())
    columns["tokens"] = np.array(tokens, np.uint32)
    if "completion_mask" in flat and not flat["completion_mask"].all():
        columns["mask"] = flat["completion_mask"].astype(np.uint8)
    header = {
        "clip": clip,
        "top": kept,
        "columns": list(columns),
        "vocabulary": [list(pair) for pair in known],
        "rows": [
            {
                **label,
                "tokens": len(value["completion_ids"]),
                "prompt": "".join(pieces[: len(value["prompt_ids"])]),
            }
            for label, value, pieces in zip(labels, values, texts, strict=True)
        ],
    }
    packed = {"header": json.dumps(header).encode(), **{key: value.tobytes() for key, value in columns.items()}}
    return {key: base64.b64encode(gzip.compress(value, mtime=0)).decode() for key, value in packed.items()}


def _candidates(
    name: str, split: str | None, trained: np.ndarray | None
) -> tuple[Dataset, str, np.ndarray, int | None]:
    """
    A split of a table, its name, the indices of the rows that may be shown, and how many of these were trained on.

    Args:
        name (`str`): Of the table.
        split (`str` or `None`): All rows of it may be shown; otherwise those of one split that were not trained on.
        trained (`(rows,)` uint64 or `None`): Hashes of the rows that were trained on, if that is known.
    """
    loaded = load_table(name, split=split)
    splits = loaded if isinstance(loaded, dict) else {str(loaded.split or split or "all rows"): loaded}
    order = sorted(splits, key=lambda part: (*_HELD_OUT, "train", part).index(part))
    for table in splits.values():
        if RESIDUAL in table.column_names:
            raise TableError(
                f"{name} holds residual scores, and tokens are coloured by a teacher’s: give the table that "
                "`residualize_table` was given."
            )
        for column in ("prompt_ids", "completion_ids", "teacher_logprobs", "teacher_fingerprint"):
            if column not in table.column_names:
                raise TableError(
                    f"{name} has no column {column!r}, only {table.column_names}: tokens are coloured by a teacher’s "
                    "scores. `trl-lopd score` makes a table of rollouts."
                )
    if trained is None:
        return splits[order[0]], order[0], np.arange(len(splits[order[0]])), None
    seen = {part: np.isin(row_hashes(rows), trained) for part, rows in splits.items()}
    if split is None:
        for part in order:
            if not seen[part].all():
                return splits[part], part, np.flatnonzero(~seen[part]), 0
    table = splits[order[0]]
    return table, order[0], np.arange(len(table)), int(seen[order[0]].sum())


def _scored(model: str, values: list[dict[str, np.ndarray]], chosen: np.ndarray) -> np.ndarray:
    """A model's log-probability of every completion token, `(tokens,)`."""
    sequences = [np.concatenate([row["prompt_ids"], row["completion_ids"]]) for row in values]
    try:
        scores = LocalTeacher(load_model(model)).score(sequences, [len(row["completion_ids"]) for row in values], 0)
    except RowError as error:
        raise TableError(f"Row {chosen[error.row]} does not fit {model}: {error}") from None
    return np.concatenate([score.logprobs for score in scores])


def _mismatches(table: Dataset, student: str | None, card: dict[str, Any]) -> Iterator[str]:
    """What tells that this is not the table, or not the student, of the run."""
    if not card.get("opd_rounds"):
        return
    last = card["opd_rounds"][-1]
    if "residual" in last:
        yield (
            "The run was trained on what `residualize_table` left of a teacher’s scores; the scores here are those "
            "before it, and the advantages are not those of the run."
        )
    for column, key, did in (
        ("teacher_fingerprint", "teachers", "scored"),
        ("student_fingerprint", "sampled_by", "sampled"),
    ):
        of_run = [entry["id"] for entry in last.get(key) or []]
        strangers = [
            id for id in column_counts(table, column) if id and not any(same_teacher(id, other) for other in of_run)
        ]
        if of_run and strangers:
            yield (
                f"This is not the table of the run: its rollouts were {did} by {', '.join(strangers)}, those that the "
                f"run was trained on by {', '.join(of_run)}."
            )
    if student is not None and not same_teacher(own := fingerprint_teacher(student).id, str(last.get("student"))):
        yield (
            f"“Before” is not the student that the run began with: it is {own}, the run began with "
            f"{last.get('student')}."
        )


def _thousandths(logprobs: np.ndarray) -> np.ndarray:
    """Natural logarithms as int16, in thousandths of a nat, not below -32.767; -32768 for -inf."""
    values = np.rint(logprobs.astype(np.float64) * 1000)
    return np.where(np.isneginf(values), _MINUS_INF, values.clip(_LOWEST, -_LOWEST)).astype(np.int16)


def text_pieces(tokenizer: PreTrainedTokenizerBase | None, ids: list[int]) -> list[str]:
    """
    The text that each token adds to that of the tokens before it.

    A token on its own may be half a character, or lose the space before it. Tokens that leave a character unfinished
    have no text, and the one that finishes it has all of it.
    """
    if tokenizer is None:
        return [f"{id} " for id in ids]

    def decode(start: int, end: int) -> str:
        return tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # The tokens from `start` to `read` have their text, and are decoded again as what comes before the next.
    pieces, start, read, before = [], 0, 0, ""
    for end in range(1, len(ids) + 1):
        text = decode(start, end)
        # At most four bytes make a character: what is unfinished after as many tokens is broken.
        if text.endswith("\ufffd") and end - read < 4 and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        start, read = read, end
        before = decode(start, read)
    return pieces
