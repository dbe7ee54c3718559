"""The command line `trl-lopd`. It parses options, calls the functions of the library and prints their results."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from . import __version__
from .errors import OfflineOPDError
from .evaluation import inspect as overview
from .evaluation.inspect import print_line as _line
from .identity.cards import entry, read_model_card, stamp_model_card
from .identity.fingerprint import fingerprint_teacher, is_id

# The options of these commands are dataclasses, which TRL's parser reads from flags and YAML.
_JOBS = {
    "rollout": "let a student answer prompts, or a teacher write SFT data, into a directory",
    "score": "let the teacher score rollouts, into a directory",
    "evaluate": "let a model answer a benchmark, and measure how well",
}


def main(argv: list[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        argv (`list[str]`, *optional*): Its words. By default those of the process.

    Returns:
        `int`: The exit status: 0, 1 for a negative answer of `inspect`, or 2 for what cannot be done.
    """
    parser = argparse.ArgumentParser(prog="trl-lopd", description="Offline on-policy distillation.")
    parser.add_argument("--version", action="version", version=f"trl-lopd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for job, job_help in _JOBS.items():
        commands.add_parser(job, help=job_help, add_help=False)
    commands.add_parser("train", help="train a student on a scored table, by `accelerate launch`", add_help=False)
    for add in (_add_fingerprint, _add_stamp, _add_inspect, _add_report):
        add(commands).add_argument("--json", action="store_true", help="print JSON")
    args, options = parser.parse_known_args(argv)
    if args.command == "train":
        return _train(options)
    if args.command in _JOBS:
        return _run(args.command, _JOBS[args.command], options)
    if options:
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    from datasets.exceptions import DatasetsError

    try:
        # Standard output is for the answer, and some libraries print greetings to it.
        with contextlib.redirect_stdout(sys.stderr):
            code, answer, show = args.answer(args)
    except (OSError, ValueError, HfHubHTTPError, DatasetsError) as error:
        print(f"trl-lopd: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(answer))
    else:
        show(answer)
    return code


def _add_fingerprint(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser("fingerprint", help="print what a model is, by content")
    command.add_argument("model", help="directory or Hub id, of a model or an adapter")
    command.add_argument("--revision", help="Hub revision")
    command.add_argument("--trust_remote_code", action="store_true", help="allow a model that ships Python code")
    command.add_argument("--probes", action="store_true", help="load the model and add its answers to the probes")
    command.set_defaults(answer=_fingerprint)
    return command


def _add_stamp(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser("stamp", help="declare in a model's card which teacher wrote its SFT data")
    command.add_argument("model", help="directory, or Hub id whose card is to be changed on the Hub")
    command.add_argument(
        "--sft_teacher",
        action="append",
        required=True,
        help="id (name@...) of the teacher, or its directory or Hub id, which is then fingerprinted; may be repeated. "
        "DOMAIN=TEACHER also declares of which `teacher_id` it wrote the data",
    )
    command.add_argument("--replace", action="store_true", help="replace the teachers that the card names already")
    command.set_defaults(answer=_stamp)
    return command


def _add_inspect(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "inspect",
        help="print what a model claims, what a table holds, and the verdict on a pair",
        description="Exits with 1 if claims and content differ, if a scored table is not valid, or if the pair is "
        "inconsistent.",
    )
    command.add_argument("name", help="directory, parquet file or Hub id of a model or a table (datasets/ORG/NAME)")
    command.add_argument("table", nargs="?", help="table that the model would be trained on")
    command.add_argument("--revision", help="Hub revision of the first")
    command.add_argument(
        "--no_content", action="store_true", help="believe the model's card: neither download nor hash its weights"
    )
    command.add_argument(
        "--teacher_consistency",
        default="strict",
        choices=["strict", "declared_ok"],
        help="what the pair must meet",
    )
    command.add_argument(
        "--rows", type=int, default=3, metavar="N", help="rows to decode that the teacher disagrees with most"
    )
    command.add_argument("--tokenizer", help="directory or Hub id of the tokenizer to decode them with")
    command.set_defaults(answer=_inspect)
    return command


def _add_report(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser("report", help="write a training run, its rollouts token by token, as one HTML file")
    command.add_argument("run", help="directory that the training wrote")
    command.add_argument(
        "--table",
        help="table of the run, for the rollouts: directory, parquet file or Hub id; of its rows, those that the run "
        "was not trained on",
    )
    command.add_argument("--split", help="split of the table to show, all of its rows")
    command.add_argument(
        "--student", help="directory or Hub id of the student before training, if the table has no ref_logprobs"
    )
    command.add_argument(
        "--rows", type=int, default=100, metavar="N", help="rollouts, drawn at random if there are more (100)"
    )
    command.add_argument("--output", help="file to write (RUN/report.html)")
    command.add_argument(
        "--report_to",
        default="none",
        choices=["none", "wandb"],
        help="log the file as an artifact, to the wandb run of the training",
    )
    command.set_defaults(answer=_report)
    return command


def _run(job: str, job_help: str, options: list[str]) -> int:
    from datasets.exceptions import DatasetsError
    from trl import TrlParser

    from . import commands
    from .processes import is_repeated

    arguments = {
        "rollout": commands.RolloutArguments,
        "score": commands.ScoreArguments,
        "evaluate": commands.EvaluateArguments,
    }[job]
    parser = TrlParser(
        arguments,
        prog=f"trl-lopd {job}",
        description=f"{job_help[0].upper()}{job_help[1:]}. `--config FILE` reads options from YAML. A run that was "
        "killed continues when started again with the same options; the last line it prints is JSON.",
    )
    try:
        if "--config" in options:
            if options[-1] == "--config":
                parser.error("argument --config: expected one argument")
            commands.check_config(options[options.index("--config") + 1], arguments)
        (args,) = parser.parse_args_and_config(options)
        with _printed_totals():
            getattr(commands, job)(args)
    except KeyboardInterrupt:
        print("trl-lopd: stopped. The same command goes on after the last shard.", file=sys.stderr)
        return 130
    except (OSError, TypeError, ValueError, ImportError, OfflineOPDError, HfHubHTTPError, DatasetsError) as error:
        if is_repeated(error) or (isinstance(error, TypeError) and "`" not in str(error)):
            raise  # the main process prints the error, or it is a bug rather than a wrong option
        print(f"trl-lopd: {error}", file=sys.stderr)
        return 2
    return 0


def _train(options: list[str]) -> int:
    from .launch import train

    try:
        train(options)
    except CalledProcessError as error:  # the script has printed its error
        return error.returncode
    except (OSError, ValueError) as error:
        print(f"trl-lopd: {error}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _printed_totals() -> Iterator[None]:
    """Prints the totals that sampling and scoring log, inside a `with` block."""
    from .generation import runs

    handler, level = logging.StreamHandler(sys.stdout), runs.logger.level
    runs.logger.addHandler(handler)
    runs.logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        runs.logger.removeHandler(handler)
        runs.logger.setLevel(level)


# Exit code, the result that `--json` prints, and a function that prints the result as text.
Answer = tuple[int, dict[str, Any], Callable[[dict[str, Any]], None]]


def _fingerprint(args: argparse.Namespace) -> Answer:
    from .names import as_name

    args.model = as_name(args.model)
    options = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    fingerprint = fingerprint_teacher(args.model, **options)
    record = fingerprint.to_dict()
    if args.probes:
        from .identity.probes import probe_model
        from .models import load_model, load_tokenizer

        record["probes"] = probe_model(load_model(args.model, options), load_tokenizer(args.model, **options))

    def show(record: dict[str, Any]) -> None:
        for key, value in record.items():
            _line(f"{key:13} {value if key != 'probes' else json.dumps(value)}")

    return 0, record, show


def _stamp(args: argparse.Namespace) -> Answer:
    from .identity.stamp import checkpoint_fingerprint
    from .names import as_name

    local = Path(args.model).exists()
    if local and not overview.is_model(args.model):
        raise ValueError(f"{args.model} is no model: it has neither config.json nor adapter_config.json.")
    before = read_model_card(args.model).get("sft_teachers") or []
    if before and not args.replace:
        raise ValueError(
            f"The card of {args.model} names SFT teachers already ({', '.join(e['id'] for e in before)}). Give "
            "`--replace` to replace them."
        )
    domains: dict[str, list[str]] = {}
    for given in args.sft_teacher:
        domain, _, name = given.rpartition("=") if not Path(given).exists() else ("", "", given)
        domains.setdefault(name, []).extend([domain] if domain else [])
    # Names on the Hub have no "@", so a name with one is an id. If it is malformed, stamping raises an error.
    are_ids = [is_id(name) or ("@" in name and not Path(name).exists()) for name in domains]
    fingerprints = [
        name if is_teacher_id else fingerprint_teacher(as_name(name))
        for name, is_teacher_id in zip(domains, are_ids, strict=True)
    ]
    teachers = [
        entry(fingerprint, "declared", teacher_ids=dict.fromkeys(of) or None)
        for fingerprint, of in zip(fingerprints, domains.values(), strict=True)
    ]
    checkpoint = checkpoint_fingerprint(args.model) if local else None
    stamp_model_card(args.model, sft_teachers=teachers, checkpoint=checkpoint)
    ids = [teacher["id"] for teacher in teachers]

    def show(_: dict[str, Any]) -> None:
        named = [f"{id} ({', '.join(of)})" if of else id for id, of in zip(ids, domains.values(), strict=True)]
        _line(f"Declared in the card of {args.model}: SFT data by {', '.join(named)}.")
        _line('Training accepts that with teacher_consistency="declared_ok".')

    return 0, {"model": args.model, "sft_teachers": ids, "evidence": "declared"}, show


def _inspect(args: argparse.Namespace) -> Answer:
    from datasets import disable_progress_bars

    disable_progress_bars()
    result = overview.inspect(
        args.name,
        args.table,
        revision=args.revision,
        look_inside=not args.no_content,
        teacher_consistency=args.teacher_consistency,
        worst=args.rows,
        tokenizer=args.tokenizer,
    )
    return 0 if overview.accepted(result) else 1, result, overview.show


def _report(args: argparse.Namespace) -> Answer:
    from .evaluation.report.report import write_report

    written = write_report(
        args.run, table=args.table, split=args.split, student=args.student, rows=args.rows, output=args.output
    )
    if args.report_to == "wandb":
        from .training.monitoring.reporters import log_report

        settings = Path(args.run, "training_args.json")
        wandb_run = json.loads(settings.read_text()).get("wandb_run") if settings.is_file() else None
        written["artifact"] = log_report(written["output"], wandb_run)

    def show(written: dict[str, Any]) -> None:
        for warning in written["warnings"]:
            _line(f"Note: {warning}")
        _line(
            f"{written['output']}: {written['rollouts']:,} rollouts of {written['tokens']:,} tokens, "
            f"{written['bytes'] / 1e6:.1f} MB"
        )
        if "artifact" in written:
            _line(f"Logged to wandb as the artifact {written['artifact']}")

    return 0, written, show


if __name__ == "__main__":
    sys.exit(main())
