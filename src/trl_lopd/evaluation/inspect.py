"""What a model claims, what a table holds, whether the two fit: `trl-lopd inspect` as functions.

[`inspect`] and what it calls return plain dicts that JSON can hold; [`show`] prints them for a person. Tables are read
in batches: what is kept of each row is its length and two hashes, and of each token one score.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..identity.cards import load_table, read_model_card, record_of
from ..identity.consistency import check_rows, check_teacher_consistency, contradictions, written_for
from ..identity.fingerprint import fingerprint_teacher
from ..names import refuse_missing

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# The default of `OfflineOPDConfig.advantage_clip`; its module takes seconds to import.
ADVANTAGE_CLIP = 10.0
# Nats: lower scores of a teacher are taken as this.
LOWEST_LOGPROB = -100.0
_QUANTILES = {"p1": 0.01, "p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99}

# Tokens shown of each of the worst rows.
_WORST_TOKENS = 5


def inspect(
    name: str,
    table: str | None = None,
    *,
    revision: str | None = None,
    look_inside: bool = True,
    teacher_consistency: str = "strict",
    worst: int = 3,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """
    What there is to know of a model, of a table, or of a model and the table it would be trained on.

    Args:
        name (`str`): Directory, parquet file or Hub id of a model or a table (`datasets/ORG/NAME`).
        table (`str`, *optional*): The table, where `name` is a model.
        revision (`str`, *optional*): Hub revision of `name`.
        look_inside (`bool`, *optional*, defaults to `True`): Fingerprint the model instead of believing its card.
        teacher_consistency (`str`, *optional*, defaults to `"strict"`): What the pair must meet, see
            [`Verdict.accepted`].
        worst (`int`, *optional*, defaults to `3`): Rows to decode that the teacher disagrees with most.
        tokenizer (`str`, *optional*): Directory or Hub id of the tokenizer to decode them with. By default looked for,
            see [`find_tokenizer`].

    Returns:
        `dict`: `model`, see [`describe_model`]; `table` with its `name`, its `splits`, see [`describe_rows`], and its
        `problems`; `verdict`. Each where it applies.

    Raises:
        OSError, ValueError: What is named is not there, is not what its place asks for, or cannot be read.
    """
    from ..table.schema import score_column

    first_is_model = is_model(name)
    if table is not None and not first_is_model:
        raise ValueError(f"{name} is a table. Name the model first: `trl-lopd inspect MODEL TABLE`.")
    if table is not None and is_model(table):
        if not Path(table).exists():
            raise ValueError(f"{table} is not there. A table on the Hub is `datasets/ORG/NAME`.")
        raise ValueError(f"{table} is a model: the second is the table to train on.")
    if worst < 0:
        raise ValueError(f"The number of rows to show is 0 or more, not {worst}.")
    result: dict[str, Any] = {}
    if first_is_model:
        result["model"] = describe_model(name, revision, look_inside)
        if table is None:
            return result
    path = table or name
    loaded = load_table(
        path if Path(path).exists() else path.removeprefix("datasets/"), revision=None if first_is_model else revision
    )
    splits = dict(loaded) if isinstance(loaded, dict) else {"all rows": loaded}
    for rows in splits.values():
        if not {"prompt", "prompt_ids", "completion_ids", "teacher_fingerprint"} & set(rows.column_names):
            raise ValueError(
                f"{path} is no table of rollouts: it has only the columns {', '.join(rows.column_names)}."
            )
    decoder = decoded_with = None
    if worst and any(score_column(rows.column_names) for rows in splits.values()):
        record = record_of(next(iter(splits.values())))
        decoder, decoded_with = find_tokenizer(tokenizer, name if first_is_model else None, revision, record, path)
    result["table"] = {
        "name": path,
        "splits": {split: describe_rows(rows, worst, decoder) for split, rows in splits.items()},
        "decoded_with": decoded_with,
    }
    result["table"]["problems"] = list(
        dict.fromkeys(problem for summary in result["table"]["splits"].values() for problem in summary.pop("problems"))
    )
    if first_is_model:
        result["table"]["problems"] += [
            f"{split}: these rows have no scores. They are SFT data or rollouts, not a table to train on: "
            "`trl-lopd score` makes one of rollouts."
            for split, summary in result["table"]["splits"].items()
            if not summary["scored"]
        ]
        result["verdict"] = _verdict(result, splits, teacher_consistency, revision)
    return result


def accepted(result: dict[str, Any]) -> bool:
    """Whether what [`inspect`] gives is in order: no claim contradicted, rows valid, a pair that may be trained."""
    if "verdict" in result:
        return result["verdict"]["accepted"]
    return not any(part["problems"] for part in result.values())


def is_model(name: str) -> bool:
    """
    Whether a path or Hub id names a model rather than a table.

    Raises:
        FileNotFoundError: A path where nothing is.
        ValueError: A file that is no parquet file.
    """
    path = Path(name)
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"{name} is a file: give the directory of a model or a table, or a parquet file.")
    if path.is_dir():
        return (path / "config.json").is_file() or (path / "adapter_config.json").is_file()
    refuse_missing(name)
    return path.suffix != ".parquet" and not name.startswith("datasets/")


def describe_model(name: str, revision: str | None = None, look_inside: bool = True) -> dict[str, Any]:
    """`fingerprint` (`None` without `look_inside`), `card` and `problems`, the claims that cannot be true."""
    card = read_model_card(name, revision)
    problems = contradictions(f"The card of {name}", card.get("sft_teachers") or [])
    fingerprint = fingerprint_teacher(name, revision=revision).to_dict() if look_inside else None
    bound_to = (card.get("model") or {}).get("id")
    if fingerprint and bound_to and not written_for(card, fingerprint["id"]):
        problems.append(f"The card was written for other weights: {bound_to}. Its claims count as declared.")
    return {"name": name, "fingerprint": fingerprint, "card": card, "problems": problems}


def describe_rows(rows: Dataset, worst: int = 3, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """
    What one split of a table, scored or not, is and holds.

    Args:
        rows ([`~datasets.Dataset`]): The split.
        worst (`int`, *optional*, defaults to `3`): Rows to decode that the teacher disagrees with most.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): To decode them with.

    Returns:
        `dict`: `rows`, `completion_tokens`, rows of each of `teachers` and `students`, `domains` (of each teacher, the
        rows of each `teacher_id`; empty without the column), `scored`, `residual` (whether the scores are those of
        `residualize_table`), `integrity`, `card`, `problems`, `statistics` (see [`statistics`]; `None` without token
        ids, or if the rows are not valid, which is then among the problems) and `worst_rows` (see [`worst_rows`]).
    """
    from ..table.schema import RESIDUAL, TableError, column_counts, score_column, teacher_counts

    summary: dict[str, Any] = {"rows": len(rows)}
    measured, shown, invalid = None, [], []
    try:
        if (measured := statistics(rows, worst)) is not None:
            summary["completion_tokens"] = measured["completion_tokens"]
            shown = worst_rows(rows, measured.pop("lowest"), tokenizer)
    except TableError as error:
        invalid = [f"This table cannot be trained on. {error}"]
    for key, column in (("teachers", "teacher_fingerprint"), ("students", "student_fingerprint")):
        summary[key] = dict(column_counts(rows, column))
    summary["domains"] = {}
    for (teacher, domain), count in teacher_counts(rows).items():
        if domain is not None:
            summary["domains"].setdefault(teacher, {})[domain] = count
    record = record_of(rows)
    status, changed = check_rows(rows)
    problems = changed if status == "altered" else ()  # otherwise the status says all
    scores = score_column(rows.column_names)
    summary |= {"scored": scores is not None, "residual": scores == RESIDUAL, "integrity": status, "card": record}
    claimed = record.get("teachers") or []
    contradicted = contradictions("The card of the table", claimed, summary["teachers"], status)
    return summary | {"problems": [*invalid, *problems, *contradicted], "statistics": measured, "worst_rows": shown}


def _verdict(result: dict[str, Any], splits: dict[str, Dataset], mode: str, revision: str | None) -> dict[str, Any]:
    own = result["model"]["fingerprint"]
    verdicts = {
        split: check_teacher_consistency(
            result["model"]["card"],
            rows,
            student_fingerprint=own["id"] if own else None,
            teacher_consistency="off",
            student=result["model"]["name"],
            table_name=f"the table ({split})",
            processing_class=find_tokenizer(None, result["model"]["name"], revision, {}, "")[0],
        )
        for split, rows in splits.items()
    }
    return {
        "mode": mode,
        # What is wrong with the model's card is in the verdicts.
        "accepted": all(v.accepted(mode) for v in verdicts.values()) and not result["table"]["problems"],
        "splits": {split: asdict(v) | {"accepted": v.accepted(mode)} for split, v in verdicts.items()},
    }


# ---- What the rows hold ----


def statistics(rows: Dataset, worst: int = 0) -> dict[str, Any] | None:
    """
    Counts and distributions over a table, or over rollouts that are not scored.

    Scores are those of the tokens that are trained on (`completion_mask`).

    Args:
        rows ([`~datasets.Dataset`]): The rows.
        worst (`int`, *optional*, defaults to `0`): How many of the rows with the lowest scores to name.

    Returns:
        `dict`, or `None` if the rows have no token ids:

        - `prompt_tokens`, `distinct_prompts`, `duplicates`: rows with the prompt and the completion of an earlier one.
        - `completion_tokens`, `trainable_tokens`, `length`: tokens of a completion, its `min`, `median`, `mean`,
          `p90`, `p99` and `max`.
        - `finish_reasons`: rows of each, those that are neither `stop` nor `length` counted as `other`; and
          `truncated`, the share of `length`. `None` without the column.
        - `floored`: teacher scores of -inf, sampled and top-k.
        - `top_k`: `k`, the mean `mass` of the stored tokens, and the share of `sampled` tokens that are among them;
          `None` without the columns.
        - `advantage`: `log pi_T - log pi_ref` a token in nats, clipped to plus or minus `clip`: `mean`, `std`, `p1`,
          `p10`, `median`, `p90`, `p99` and `clipped`, the share that was; and `teachers`, of each the `std` of its
          rows and, by `teacher_ids`, of those of each domain. `None` without `ref_logprobs`.
        - `teacher_logprob`: instead, the same of the teacher's scores, lower ones than -100 taken as -100.
        - `lowest`: index and mean advantage, or teacher score, of the `worst` rows, the lowest first.

    Raises:
        TableError: The rows are scored and no valid table, or have nulls among their ids. The message says where.
    """
    from ..table.schema import holds_ids, lengths, prompt_and_row_hashes, score_column, validate_table

    scored, relative = score_column(rows.column_names) is not None, ("ref_logprobs" in rows.column_names)
    ids = ("prompt_ids", "completion_ids")
    if not scored and not all(name in rows.column_names and holds_ids(rows, name) for name in ids):
        return None
    # Any floor will do: the scores below it are counted, not clamped.
    valid = validate_table(rows, teacher_logprob_floor=-1.0) if scored else None
    prompts, whole = prompt_and_row_hashes(rows)
    prompt_lengths, completion_lengths = lengths(rows)
    reasons = _finish_reasons(rows)
    if scored:
        trainable = valid.trainable_tokens
    elif "completion_mask" in rows.column_names:
        trainable = sum(map(sum, rows["completion_mask"]))
    else:
        trainable = int(completion_lengths.sum())
    result: dict[str, Any] = {
        "prompt_tokens": int(prompt_lengths.sum()),
        "distinct_prompts": len(np.unique(prompts)),
        "duplicates": len(rows) - len(np.unique(whole)),
        "completion_tokens": int(completion_lengths.sum()),
        "trainable_tokens": trainable,
        "length": None,
        "finish_reasons": reasons,
        "truncated": reasons["length"] / sum(reasons.values()) if reasons and any(reasons.values()) else None,
        "floored": valid.floored if scored else 0,
        "top_k": None,
        "advantage": None,
        "teacher_logprob": None,
        "lowest": [],
    }
    if len(rows):
        median, p90, p99 = np.quantile(completion_lengths, (0.5, 0.9, 0.99)).tolist()
        ends = {"min": int(completion_lengths.min()), "max": int(completion_lengths.max())}
        result["length"] = ends | {"median": median, "mean": float(completion_lengths.mean()), "p90": p90, "p99": p99}
    if not scored:
        return result
    scores, counts, result["top_k"] = _token_scores(rows, relative, valid.top_k)
    bounded = scores.clip(-ADVANTAGE_CLIP, ADVANTAGE_CLIP) if relative else scores.clip(LOWEST_LOGPROB)
    distribution = {"mean": float(bounded.mean(dtype=np.float64)), "std": float(bounded.std(dtype=np.float64))}
    distribution |= dict(zip(_QUANTILES, np.quantile(bounded, list(_QUANTILES.values())).tolist(), strict=True))
    if not relative:
        result["teacher_logprob"] = distribution
    else:
        result["advantage"] = distribution | {"clip": ADVANTAGE_CLIP, "clipped": float((scores != bounded).mean())}
        result["advantage"]["teachers"] = _spreads(rows, bounded, counts)
    means = np.add.reduceat(bounded, np.cumsum(counts) - counts, dtype=np.float64) / counts
    lowest = np.argsort(means, kind="stable")[:worst]
    return result | {"lowest": list(zip(lowest.tolist(), means[lowest].tolist(), strict=True))}


def _token_scores(rows: Dataset, relative: bool, top_k: int) -> tuple[np.ndarray, np.ndarray, dict[str, float] | None]:
    """
    Of the tokens of a valid table that are trained on: the advantage, or the teacher's score, of each, `(tokens,)`;
    how many each row has, `(rows,)`; and what the top-k columns cover, `None` without them.
    """
    from ..table.schema import TOKEN_COLUMNS, batches, flat_values, score_column

    parts, counts, mass, among = [], [], 0.0, 0
    names = [name for name in TOKEN_COLUMNS if name in rows.column_names]
    for batch in batches(rows, names, 256):
        sizes, ids = flat_values("completion_ids", batch)
        values = {name: flat_values(name, batch)[1] for name in names}
        trained = values.get("completion_mask", slice(None))
        parts.append(values[score_column(names)][trained])
        if relative:
            parts[-1] = parts[-1] - values["ref_logprobs"][trained]
        counts.append(np.bincount(np.repeat(np.arange(len(sizes)), sizes)[trained]))
        if top_k:
            # numpy computes float16 in software, many times slower.
            logprobs = values["teacher_topk_logprobs"].astype(np.float32).reshape(-1, top_k)[trained]
            mass += float(np.exp(logprobs).sum(dtype=np.float64))
            best = values["teacher_topk_ids"].reshape(-1, top_k)[trained]
            among += int((best == ids[trained, None]).any(-1).sum())
    scores = np.concatenate(parts)
    covered = {"k": top_k, "mass": mass / len(scores), "sampled": among / len(scores)} if top_k else None
    return scores, np.concatenate(counts), covered


def _spreads(rows: Dataset, advantages: np.ndarray, counts: np.ndarray) -> dict[str, dict[str, Any]]:
    """Standard deviation of the advantages, `(tokens,)`, of each teacher's rows and of those of each of its domains,
    which have `counts` tokens, `(rows,)`."""
    from ..table.schema import TEACHER_ID, holds_names

    starts = np.cumsum(counts) - counts
    sums, squares = (np.add.reduceat(values, starts, dtype=np.float64) for values in (advantages, advantages**2))

    def std(indices: np.ndarray) -> float:
        tokens = counts[indices].sum()
        return float(np.sqrt(max(squares[indices].sum() / tokens - (sums[indices].sum() / tokens) ** 2, 0.0)))

    teachers = np.array(rows["teacher_fingerprint"][:], dtype=object)
    domains = np.array(rows[TEACHER_ID][:] if holds_names(rows, TEACHER_ID) else [None] * len(rows), dtype=object)
    result = {}
    for teacher in sorted({*teachers}):
        of_teacher = teachers == teacher
        names = sorted({*domains[of_teacher]} - {None})
        by_domain = {name: std(np.flatnonzero(of_teacher & (domains == name))) for name in names}
        result[teacher] = {"std": std(np.flatnonzero(of_teacher)), "teacher_ids": by_domain}
    return result


def _finish_reasons(rows: Dataset) -> dict[str, int] | None:
    from ..table.schema import column_counts

    if getattr(rows.features.get("finish_reason"), "dtype", "") not in ("string", "large_string"):
        return None
    reasons = column_counts(rows, "finish_reason")
    reasons.pop(None, None)
    known = {reason: reasons.pop(reason, 0) for reason in ("stop", "length")}
    return known | {"other": reasons.total()}


# ---- The worst rows ----


def worst_rows(
    rows: Dataset, ranking: list[tuple[int, float]], tokenizer: PreTrainedTokenizerBase | None = None
) -> list[dict[str, Any]]:
    """
    Rows of a valid table to be read by a person.

    Args:
        rows ([`~datasets.Dataset`]): The table.
        ranking (`list[tuple[int, float]]`): Index of each row to give, and the mean it was ranked by.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Without it texts are those of the columns
            `prompt` and `completion`, else `None`.

    Returns:
        `list[dict]`: `row`, `mean`, `prompt` and `completion` as text and as `prompt_ids` and `completion_ids`, and
        `tokens`: the trained tokens with the lowest advantage, or teacher score without `ref_logprobs`, lowest first.
        Each has `position`, `id`, `text`, `before` (the text that ends where it begins), `teacher_logprob` (`None` for
        -inf), `ref_logprob` and `advantage`, not clipped, in nats; the last two `None` without `ref_logprobs`. Texts
        are as the model wrote them, control characters included.
    """
    from ..table.schema import score_column

    scores = score_column(rows.column_names)
    names = ["prompt_ids", "completion_ids", scores, "ref_logprobs", "completion_mask"]
    texts = ["prompt", "completion"]
    rows = rows.select_columns([name for name in [*names, *texts] if name in rows.column_names])

    def finite(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    result = []
    for index, mean in ranking:
        row = rows[index]
        ids = row["completion_ids"]
        teacher = np.array(row[scores], np.float64)
        ref = np.array(row["ref_logprobs"], np.float64) if "ref_logprobs" in row else None
        order = np.argsort(teacher if ref is None else teacher - ref, kind="stable")
        order = order[np.array(row.get("completion_mask", [True] * len(ids)), bool)[order]].tolist()
        tokens = [
            {
                "position": at,
                "id": ids[at],
                "text": tokenizer and tokenizer.decode([ids[at]]),
                "before": tokenizer and tokenizer.decode(ids[max(at - 8, 0) : at]),
                "teacher_logprob": finite(teacher[at]),
                "ref_logprob": None if ref is None else float(ref[at]),
                "advantage": None if ref is None else finite(teacher[at] - ref[at]),
            }
            for at in order[:_WORST_TOKENS]
        ]
        shown = {
            name: tokenizer.decode(row[f"{name}_ids"]) if tokenizer else _text_of(row.get(name)) for name in texts
        }
        kept = {name: row[name] for name in ("prompt_ids", "completion_ids")}
        result.append({"row": index, "mean": mean, **shown, **kept, "tokens": tokens})
    return result


def _text_of(value: Any) -> str | None:
    """The text of a `prompt` or `completion`, or of the last of its messages."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    return value if isinstance(value, str) else None


def find_tokenizer(
    name: str | None, model: str | None, revision: str | None, record: dict[str, Any], table: str
) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """
    A tokenizer for the ids of a table, and where it is from; `None` for both if there is none.

    It is the one that is named; else the model's; else that of the models that sampled or scored the rows, by the name
    in the table's record, as a path, beside the table, or on the Hub. A name proves nothing, so the last is taken only
    if its content is what the record says.

    Args:
        name (`str` or `None`): Directory or Hub id of the tokenizer.
        model (`str` or `None`): Directory or Hub id of the student.
        revision (`str` or `None`): Hub revision of the student.
        record (`dict`): What [`record_of`] gives for the table.
        table (`str`): Where the table is.

    Raises:
        OSError, ValueError: There is no tokenizer at `name`.
    """
    from ..identity.vocabulary import tokenizer_of
    from ..models import load_tokenizer

    if name is not None:
        return load_tokenizer(name, trust_remote_code=False), name
    if model is not None:
        # Whatever a damaged or unreachable model raises: a table is readable without its text.
        with contextlib.suppress(Exception):
            return load_tokenizer(model, revision=revision, trust_remote_code=False), model
    entries = [*(record.get("students") or []), *(record.get("teachers") or [])]
    candidates = (tokenizer_of(entry, table) for entry in entries)
    return next((tokenizer for tokenizer in candidates if tokenizer is not None), (None, None))


# ---- For a person ----

_INTEGRITY = {
    "intact": "as they were scored",
    "altered": "NOT as they were scored",
    "unverified": "no digest to hold them against",
}


def visible(text: str) -> str:
    """`text` on one line, with nothing in it that a terminal would act on: a model may have written it."""
    return "".join(
        c if c.isprintable() else {"\n": "↵", "\t": "⇥"}.get(c) or c.encode("unicode_escape").decode() for c in text
    )


def print_line(text: str, style: str | None = None) -> None:
    # Ids are for copying: never wrapped.
    Console(soft_wrap=True, highlight=False).print(visible(text), markup=False, emoji=False, style=style)


def show(result: dict[str, Any]) -> None:
    """Prints what [`inspect`] gives."""
    if "model" in result:
        _show_model(result["model"])
    for split, summary in result.get("table", {}).get("splits", {}).items():
        _show_rows(result["table"]["name"], split, summary, result["table"]["decoded_with"])
    for part in ("model", "table"):
        for problem in result.get(part, {}).get("problems", ()):
            print_line(f"! {problem}", "yellow")
    for split, verdict in result.get("verdict", {}).get("splits", {}).items():
        word = f"consistent ({verdict['evidence']})" if verdict["consistent"] else "INCONSISTENT"
        if verdict["consistent"] and not verdict["accepted"]:
            word += f", not enough for mode {result['verdict']['mode']}"
        print_line(f"Verdict, {split}: {word}", "bold green" if verdict["accepted"] else "bold red")
        print_line(f"  {verdict['reason']}")
        for warning in verdict["warnings"]:
            print_line(f"  ! {warning}", "yellow")


def _show_model(model: dict[str, Any]) -> None:
    def entries(title: str, items: list[dict[str, Any]], total: int | None) -> None:
        for item in items:
            rows = f", {item['rows']:,} rows" if "rows" in item else ""
            share = f" ({item['share']:.1%})" if "share" in item else ""
            print_line(f"  {title:12} {item['id']}  {item.get('evidence', 'declared')}{rows}{share}")
            title = ""
            _show_domains(item.get("teacher_ids") or {}, total)

    own, card = model["fingerprint"], model["card"]
    print_line(f"Model {model['name']}", "bold")
    if own:
        size = f"{own['parameters']:,} parameters, {own['dtype']}, {own['architecture']}"
        print_line(f"  {'content':12} {own['id']}  {size}")
    bound = (card.get("model") or {}).get("id")
    unbound = "bound to no weights" if card else "names no teacher"
    print_line(f"  {'card':12} {f'written for {bound}' if bound else unbound}")
    entries("SFT teachers", card.get("sft_teachers") or [], card.get("sft_rows"))
    for i, round in enumerate(card.get("opd_rounds") or [], start=1):
        print_line(
            f"  OPD round {i}  from {round.get('student')}, {round.get('objective')}, "
            f"teacher consistency: {round.get('teacher_consistency')}"
        )
        teachers = round.get("teachers") or []
        counts = [item.get("rows") for item in teachers]
        total = None if None in counts else sum(counts)
        entries("", [{**item, "id": f"scored by {item['id']}"} for item in teachers], total)


def _show_rows(name: str, split: str, summary: dict[str, Any], decoded_with: str | None) -> None:
    print_line(f"Table {name}, {split}", "bold")
    print_line(
        f"  {'rows':12} {summary['rows']:,}, of {summary.get('completion_tokens', 0):,} completion tokens; "
        f"{_INTEGRITY[summary['integrity']]}"
    )
    measured = summary["statistics"]
    spreads = ((measured or {}).get("advantage") or {}).get("teachers", {})
    for key, title in (
        ("teachers", "scored by" if summary["scored"] else "written by"),
        ("students", "sampled by"),
    ):
        for id, count in summary[key].items() or {"not named": summary["rows"]}.items():
            spread = spreads.get(id, {}) if key == "teachers" else {}
            std = f", advantages of std {spread['std']:.3f}" if spread and len(spreads) > 1 else ""
            print_line(f"  {title:12} {id or 'not named'}  {count:,} rows{std}")
            domains = summary["domains"].get(id, {}) if key == "teachers" else {}
            _show_domains(domains, summary["rows"], spread.get("teacher_ids"))
    if summary["residual"]:
        fits = summary["card"].get("residual") or []
        explained = ", ".join(f"{fit['explained_variance']:.1%}" for fit in fits)
        known = f"explains {explained} of the variance" if fits else "has no record"
        print_line(f"  {'residual':12} not the teacher's scores: the recurring part was subtracted, which {known}")
    if not measured or not summary["rows"]:
        return
    for title, text in _facts(summary["rows"], measured):
        print_line(f"  {title:12} {text}")
    if summary["worst_rows"]:
        scores = "residual" if summary["residual"] else "teacher"
        _show_worst(summary["worst_rows"], scores, bool(measured["advantage"]), split, decoded_with)


def _show_domains(domains: dict[str, int | None], total: int | None, spreads: dict[str, float] | None = None) -> None:
    """Prints the rows of each domain of a teacher, with their share of all rows and the spread of their advantages."""
    for domain, rows in sorted(domains.items(), key=lambda item: -(item[1] or 0)):
        share = f" ({_share(rows / total)})" if rows and total else ""
        std = f", advantages of std {spreads[domain]:.3f}" if domain in (spreads or {}) else ""
        print_line(f"  {'':12}   {domain:12} {f'{rows:,} rows{share}' if rows else 'rows not counted'}{std}")


def _facts(rows: int, measured: dict[str, Any]) -> Iterator[tuple[str, str]]:
    from ..table.schema import LEAST_SPREAD

    distinct, repeated, length = measured["distinct_prompts"], measured["duplicates"], measured["length"]
    answers = "1 answer" if rows == distinct else f"{rows / distinct:.3g} answers"
    repeats = f"{repeated:,} rows repeat an earlier prompt and answer" if repeated else "no row repeats another"
    yield "prompts", f"{distinct:,} distinct, {answers} each, {measured['prompt_tokens']:,} tokens; {repeats}"
    sizes = ", ".join(f"{key} {length[key]:,.0f}" for key in ("min", "median", "mean", "p90", "p99", "max"))
    yield "completions", f"{sizes} tokens"
    if measured["truncated"] is not None:
        other = measured["finish_reasons"]["other"]
        more = f"; {other:,} ended otherwise" if other else ""
        yield "truncated", f"{_share(measured['truncated'])} of completions reached the length limit{more}"
    if measured["trainable_tokens"] < measured["completion_tokens"]:
        share = _share(measured["trainable_tokens"] / measured["completion_tokens"])
        yield "trained on", f"{measured['trainable_tokens']:,} tokens, {share} (completion_mask)"
    if top_k := measured["top_k"]:
        mass, sampled = _share(top_k["mass"]), _share(top_k["sampled"])
        yield "top-k", f"k = {top_k['k']}, with {mass} of the teacher's probability and {sampled} of sampled tokens"
    if measured["floored"]:
        yield "-inf", f"{measured['floored']:,} teacher scores: training needs `teacher_logprob_floor`"
    if scores := measured["advantage"] or measured["teacher_logprob"]:
        spread = ", ".join(f"{key} {scores[key]:.3f}" for key in ("mean", "std", *_QUANTILES))
    if measured["advantage"]:
        clipped = f"{_share(scores['clipped'])} clipped at ±{scores['clip']:g}"
        yield "advantage", f"{spread}; nats a token at the start, {clipped}"
        if scores["std"] < LEAST_SPREAD:
            hint = "loss_type='sampled' cost accuracy where measured (docs/evidence.md)"
            yield "", f"with a std below {LEAST_SPREAD:g}, {hint}"
    elif measured["teacher_logprob"]:
        yield "teacher", f"log-probability: {spread}; nats a token"
        yield "advantage", "not known: it needs `ref_logprobs`, which scoring adds with `ref_model`"


def _share(part: float) -> str:
    if 0 < part < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= part < 1 else f"{part:.1%}"


def _show_worst(
    worst: list[dict[str, Any]], scores: str, relative: bool, split: str, decoded_with: str | None
) -> None:
    console = Console(highlight=False)
    print_line(f"Lowest mean {'advantage' if relative else 'teacher log-probability'}, {split}", "bold")
    if decoded_with is not None:
        print_line(f"  decoded with {decoded_with}", "dim")
    elif any(row["completion"] is None for row in worst):
        print_line(
            "  token ids, because no tokenizer was measured: name one with --tokenizer to read them as text", "dim"
        )
    for row in worst:
        prompt, completion = (
            visible(" ".join(map(str, row[f"{name}_ids"])) if row[name] is None else row[name])
            for name in ("prompt", "completion")
        )
        shown = f"{scores} | ref" if relative else scores
        summary = f"{row['mean']:.2f} nats a token, {len(row['completion_ids']):,} tokens; worst tokens: {shown}"
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True, min_width=12)
        grid.add_column(overflow="fold")
        grid.add_row(f"row {row['row']:,}", summary)
        grid.add_row("prompt", Text(_shortened(prompt, 200)))
        grid.add_row("answer", Text(_shortened(completion, 400)))
        grid.add_row("worst", Columns([_token(token) for token in row["tokens"]], padding=(0, 2)))
        console.print(Padding(grid, (0, 0, 0, 2)))


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def _token(token: dict[str, Any]) -> Text:
    text = str(token["id"]) if token["text"] is None else visible(token["text"][:24])
    before = visible((token["before"] or "")[-12:])
    teacher = "-inf" if token["teacher_logprob"] is None else f"{token['teacher_logprob']:.2f}"
    scores = teacher if token["ref_logprob"] is None else f"{teacher} | {token['ref_logprob']:.2f}"
    shown = (f"▸{text}◂", "bold red")
    return Text.assemble((f"{token['position']}: ", "dim"), (before, "dim"), shown, f" {scores}")
