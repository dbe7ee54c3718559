"""`trl-lopd`: what a model or a table is, what it claims, and whether the two fit. Thin: it calls the functions."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console

from . import __version__
from .cards import load_table, read_model_card, stamp_model_card
from .consistency import check_rows, check_teacher_consistency, contradictions
from .fingerprint import WEIGHTS_DIFFER, TeacherFingerprint, diff_ids, fingerprint_teacher, is_id

if TYPE_CHECKING:
    from datasets import Dataset


_INTEGRITY = {
    "intact": "as they were scored",
    "altered": "NOT as they were scored",
    "unverified": "no digest to hold them against",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trl-lopd", description="Who taught this model, and who scored this table?")
    parser.add_argument("--version", action="version", version=f"trl-lopd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("fingerprint", help="print what a model is, by content")
    command.add_argument("model", help="directory or Hub id, of a model or an adapter")
    command.add_argument("--revision", help="Hub revision")
    command.add_argument("--trust-remote-code", action="store_true", help="allow a model that ships Python code")
    command.add_argument("--no-cache", action="store_true", help="hash the files even if they were hashed before")
    command.add_argument("--probes", action="store_true", help="load the model and add its answers to the probes")

    command = commands.add_parser("stamp", help="declare in a model's card which teacher wrote its SFT data")
    command.add_argument("model", help="directory, or Hub id whose card is to be changed on the Hub")
    command.add_argument(
        "--sft-teacher",
        action="append",
        required=True,
        help="id (name@...) of the teacher, or its directory or Hub id, which is then fingerprinted; may be repeated",
    )
    command.add_argument("--replace", action="store_true", help="replace the teachers that the card names already")

    command = commands.add_parser(
        "inspect",
        help="print what a model or a table claims, and the verdict on a pair",
        description="Exits with 1 if claims and content differ, or if the pair is inconsistent.",
    )
    command.add_argument("name", help="directory, parquet file or Hub id of a model or a table (datasets/ORG/NAME)")
    command.add_argument("table", nargs="?", help="table that the model would be trained on")
    command.add_argument("--revision", help="Hub revision of the first")
    command.add_argument(
        "--no-content", action="store_true", help="believe the model's card: neither download nor hash its weights"
    )
    command.add_argument("--mode", default="strict", choices=["strict", "declared_ok"], help="what the pair must meet")

    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    run = {"fingerprint": _fingerprint, "stamp": _stamp, "inspect": _inspect}[args.command]
    try:
        # Some libraries greet on the standard output, which is for the answer.
        with contextlib.redirect_stdout(sys.stderr):
            code, answer, show = run(args)
    except (OSError, ValueError, HfHubHTTPError) as error:
        print(f"trl-lopd: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(answer))
    else:
        show(answer)
    return code


# Exit code, what `--json` prints, and what prints it for a person.
Answer = tuple[int, dict[str, Any], Callable[[dict[str, Any]], None]]


def _line(text: str, style: str | None = None) -> None:
    # Ids are for copying: never wrapped.
    Console(soft_wrap=True, highlight=False).print(text, markup=False, style=style)


def _fingerprint(args: argparse.Namespace) -> Answer:
    options = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    fingerprint = fingerprint_teacher(args.model, use_cache=not args.no_cache, **options)
    record = fingerprint.to_dict()
    if args.probes:
        from .models import load_model, load_tokenizer
        from .probes import probe_model

        record["probes"] = probe_model(load_model(args.model, options), load_tokenizer(args.model, **options))

    def show(record: dict[str, Any]) -> None:
        for key, value in record.items():
            _line(f"{key:13} {value if key != 'probes' else json.dumps(value)}")

    return 0, record, show


def _stamp(args: argparse.Namespace) -> Answer:
    from .stamp import checkpoint_fingerprint

    local = Path(args.model).exists()
    if local and not _is_model(args.model):
        raise ValueError(f"{args.model} is no model: it has neither config.json nor adapter_config.json.")
    before = read_model_card(args.model).get("sft_teachers") or []
    if before and not args.replace:
        raise ValueError(
            f"The card of {args.model} names SFT teachers already ({', '.join(e['id'] for e in before)}). Give "
            "`--replace` to put yours in their place."
        )
    teachers = [name if is_id(name) else fingerprint_teacher(name) for name in args.sft_teacher]
    checkpoint = checkpoint_fingerprint(args.model) if local else None
    stamp_model_card(args.model, sft_teachers=teachers, checkpoint=checkpoint)
    ids = [t.id if isinstance(t, TeacherFingerprint) else t for t in teachers]

    def show(_: dict[str, Any]) -> None:
        _line(f"Declared in the card of {args.model}: SFT data by {', '.join(ids)}.")
        _line('Training accepts that with teacher_consistency="declared_ok".')

    return 0, {"model": args.model, "sft_teachers": ids, "evidence": "declared"}, show


def _inspect(args: argparse.Namespace) -> Answer:
    from datasets import disable_progress_bars

    disable_progress_bars()
    first_is_model = _is_model(args.name)
    if args.table is not None and not first_is_model:
        raise ValueError(f"{args.name} is a table. Name the model first: `trl-lopd inspect MODEL TABLE`.")
    if args.table is not None and _is_model(args.table):
        raise ValueError(
            f"{args.table} is a model: the second is the table to train on. One on the Hub is `datasets/ORG/NAME`."
        )
    result: dict[str, Any] = {}
    if first_is_model:
        result["model"] = _about_model(args.name, args.revision, not args.no_content)
    splits: dict[str, Any] = {}
    if args.table is not None or not first_is_model:
        name = args.table or args.name
        revision = args.revision if args.table is None else None
        loaded = load_table(name if Path(name).exists() else name.removeprefix("datasets/"), revision=revision)
        splits = dict(loaded) if isinstance(loaded, dict) else {"all rows": loaded}
        result["table"] = {"name": name, "splits": {split: _about_rows(rows) for split, rows in splits.items()}}
        result["table"]["problems"] = list(
            dict.fromkeys(p for about in result["table"]["splits"].values() for p in about.pop("problems"))
        )
    problems = [problem for part in result.values() for problem in part["problems"]]
    accepted = not problems
    if args.table is not None:
        own = result["model"]["fingerprint"]
        verdicts = {
            split: check_teacher_consistency(
                result["model"]["card"],
                rows,
                student_fingerprint=own["id"] if own else None,
                mode="off",
                student=args.name,
                table_name=f"the table ({split})",
            )
            for split, rows in splits.items()
        }
        # What is wrong with the model's card is in the verdicts.
        accepted = all(v.accepted(args.mode) for v in verdicts.values()) and not result["table"]["problems"]
        result["verdict"] = {
            "mode": args.mode,
            "accepted": accepted,
            "splits": {
                split: {"consistent": v.consistent, "evidence": v.evidence, "accepted": v.accepted(args.mode)}
                | {"reason": v.reason, "warnings": list(v.warnings), "rows": v.rows, "off_policy": v.off_policy}
                for split, v in verdicts.items()
            },
        }
    return 0 if accepted else 1, result, _show


def _is_model(name: str) -> bool:
    path = Path(name)
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"{name} is a file: give the directory of a model or a table, or a parquet file.")
    if path.is_dir():
        return (path / "config.json").is_file() or (path / "adapter_config.json").is_file()
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
        raise FileNotFoundError(f"{name} is not there.")
    return path.suffix != ".parquet" and not name.startswith("datasets/")


def _about_model(name: str, revision: str | None, look_inside: bool) -> dict[str, Any]:
    card = read_model_card(name, revision)
    problems = contradictions(f"The card of {name}", card.get("sft_teachers") or [])
    fingerprint = fingerprint_teacher(name, revision=revision).to_dict() if look_inside else None
    bound_to = (card.get("model") or {}).get("id")
    if fingerprint and bound_to and WEIGHTS_DIFFER in diff_ids(fingerprint["id"], bound_to):
        problems.append(f"The card was written for other weights: {bound_to}. Its claims count as declared.")
    return {"name": name, "fingerprint": fingerprint, "card": card, "problems": problems}


def _about_rows(rows: Dataset) -> dict[str, Any]:
    from .cards import record_of
    from .table import column_counts, lengths

    columns = {"teachers": "teacher_fingerprint", "students": "student_fingerprint"}
    about: dict[str, Any] = {"rows": len(rows)}
    if "completion_ids" in rows.column_names and "prompt_ids" in rows.column_names:
        about["completion_tokens"] = int(lengths(rows)[1].sum())
    for key, column in columns.items():
        about[key] = dict(column_counts(rows, column))
    record = record_of(rows)
    status, problems = check_rows(rows)
    about |= {"scored": "teacher_logprobs" in rows.column_names, "integrity": status, "card": record}
    claimed = record.get("teachers") or []
    about["problems"] = [*problems, *contradictions("The card of the table", claimed, about["teachers"], status)]
    return about


def _show(result: dict[str, Any]) -> None:
    def entries(title: str, items: list[dict[str, Any]]) -> None:
        for item in items:
            rows = f", {item['rows']:,} rows" if "rows" in item else ""
            share = f" ({item['share']:.1%})" if "share" in item else ""
            _line(f"  {title:12} {item['id']}  {item.get('evidence', 'declared')}{rows}{share}")
            title = ""

    if "model" in result:
        model = result["model"]
        own, card = model["fingerprint"], model["card"]
        _line(f"Model {model['name']}", "bold")
        if own:
            size = f"{own['parameters']:,} parameters, {own['dtype']}, {own['architecture']}"
            _line(f"  {'content':12} {own['id']}  {size}")
        bound = (card.get("model") or {}).get("id")
        unbound = "bound to no weights" if card else "names no teacher"
        _line(f"  {'card':12} {f'written for {bound}' if bound else unbound}")
        entries("SFT teachers", card.get("sft_teachers") or [])
        for i, round in enumerate(card.get("opd_rounds") or [], start=1):
            _line(f"  OPD round {i}  from {round.get('student')}, {round.get('objective')}, "
                 f"teacher consistency: {round.get('teacher_consistency')}")  # fmt: skip
            entries("", [{**item, "id": f"scored by {item['id']}"} for item in round.get("teachers") or []])
    for split, about in result.get("table", {}).get("splits", {}).items():
        _line(f"Table {result['table']['name']}, {split}", "bold")
        _line(f"  {'rows':12} {about['rows']:,}, of {about.get('completion_tokens', 0):,} completion tokens; "
             f"{_INTEGRITY[about['integrity']]}")  # fmt: skip
        for key, title in (("teachers", "scored by" if about["scored"] else "written by"), ("students", "sampled by")):
            for id, count in about[key].items() or {"nobody named": about["rows"]}.items():
                _line(f"  {title:12} {id or 'nobody named'}  {count:,} rows")
    for part in ("model", "table"):
        for problem in result.get(part, {}).get("problems", ()):
            _line(f"! {problem}", "yellow")
    if "verdict" in result:
        for split, verdict in result["verdict"]["splits"].items():
            word = f"consistent ({verdict['evidence']})" if verdict["consistent"] else "INCONSISTENT"
            if verdict["consistent"] and not verdict["accepted"]:
                word += f", not enough for mode {result['verdict']['mode']}"
            _line(f"Verdict, {split}: {word}", "bold green" if verdict["accepted"] else "bold red")
            _line(f"  {verdict['reason']}")
            for warning in verdict["warnings"]:
                _line(f"  ! {warning}", "yellow")


if __name__ == "__main__":
    sys.exit(main())
