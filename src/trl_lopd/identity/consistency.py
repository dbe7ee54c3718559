"""The rule: may this student train on this table?

Teacher consistency (Lightning OPD, arXiv 2604.13010): the teacher that wrote the student's SFT answers must be the
teacher that scored its rollouts. Where several teachers wrote them, every row must have been scored by one of these,
and by one that wrote SFT data of the row's domain (`teacher_id`), as far as the card and the table say which that is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import TeacherConsistencyError
from .cards import Signature, record_of
from .fingerprint import (
    EVIDENCE,
    SCHEMA_DIFFERS,
    TEMPLATE_DIFFERS,
    TOKENIZER_DIFFERS,
    WEIGHTS_DIFFER,
    TeacherFingerprint,
    content_id,
    diff_ids,
    evidence_of,
    is_id,
    same_teacher,
    tokenizer_part,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MODES = ("strict", "declared_ok", "warn", "off")

# The evidence of a verdict on a residual table; no claim of a card has it.
RESIDUAL_EVIDENCE = "residual"

_OVERRIDE = 'override with teacher_consistency="warn" or "off" at your own risk'


@dataclass(frozen=True)
class Verdict:
    """
    Whether a table's teachers are those behind a student's SFT data, and how that is known.

    Args:
        consistent (`bool`): Whether every teacher in the table is one that wrote the student's SFT data, and the
            student reads the tokens as the one that sampled them. A residual table (`residualize_table`) may be of
            any teacher.
        evidence (`str` or `None`): The weakest link behind that: `"verified"`, `"probed"` or `"declared"`; `None` if
            it is not consistent. `"residual"` if the scores are another teacher's, less their recurring part, so that
            nothing holds them against the SFT data.
        reason (`str`): Why, naming the teachers on both sides; if not consistent, also what to do.
        warnings (`tuple[str, ...]`): What does not forbid training but should be known.
        rows (`str`): `"intact"` if the rows are those that were scored, `"altered"` if they are known not to be,
            `"unverified"` if that cannot be told: no digest, or rows taken away or added since.
        off_policy (`bool`): Whether other weights than the student's sampled some of the rows.
    """

    consistent: bool
    evidence: str | None
    reason: str
    warnings: tuple[str, ...] = ()
    rows: str = "unverified"
    off_policy: bool = False

    def accepted(self, mode: str = "strict") -> bool:
        """Whether training may start: in `"strict"` mode not on declared evidence, in `"warn"` and `"off"` always."""
        if mode in ("warn", "off"):
            return True
        return self.consistent and (mode == "declared_ok" or self.evidence != "declared")

    def enforce(self, mode: str) -> Verdict:
        """
        Raises or logs what `mode` says; returns the verdict.

        Raises:
            `TeacherConsistencyError`: if the verdict is not accepted.
        """
        if not self.accepted(mode):
            raise TeacherConsistencyError(self.reason)
        if mode == "warn" and not self.accepted("strict"):
            logger.warning(self.reason)
        if mode != "off":
            for warning in self.warnings:
                logger.warning(warning)
        return self


def check_teacher_consistency(
    student_card: dict[str, Any],
    table: Dataset | Iterable[Signature],
    *,
    sampled_by: Iterable[str | None] = (),
    is_residual: bool = False,
    student_fingerprint: TeacherFingerprint | str | None = None,
    teacher_consistency: str = "strict",
    student: str = "the student",
    table_name: str = "the table",
    processing_class: PreTrainedTokenizerBase | None = None,
) -> Verdict:
    """
    Decide whether the teachers that scored a table are the teachers behind a student's SFT data.

    Args:
        student_card (`dict`): What [`read_model_card`] gives for the student.
        table ([`~datasets.Dataset`] or `Iterable`): The table, or only the distinct values of its
            `teacher_fingerprint` column, or its distinct pairs of `teacher_fingerprint` and `teacher_id`. A value
            that is no fingerprint stands for rows of an unknown teacher, and is never consistent. A pair whose
            teacher wrote no SFT data of its `teacher_id`, and others did, is not consistent either.
        sampled_by (`Iterable[str]`, *optional*): The distinct values of its `student_fingerprint` column, if `table`
            is not the table itself.
        is_residual (`bool`, *optional*, defaults to `False`): Whether its scores are residuals (`residualize_table`),
            if `table` is not the table itself. Any teacher is accepted then, with the evidence `"residual"` and a
            warning; an unknown one is not.
        student_fingerprint ([`TeacherFingerprint`] or `str`, *optional*): The student's own, or its id. Without it
            nothing is said of whether the card was written for this student, and whether it sampled the rollouts. An
            empty one says that the student has none, so that what its card says counts as declared.
        teacher_consistency (`str`): `"strict"` raises unless the pair is consistent and verified or probed;
            `"declared_ok"` also accepts SFT teachers that a person declared; `"warn"` warns instead of raising;
            `"off"` is silent.
        student (`str`): What messages call the student.
        table_name (`str`): What messages call the table.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): The student's tokenizer.
            Where the teacher's differs, and the table's record does not say that both mean the same by the ids in the
            rows, the two are compared.

    Raises:
        `TeacherConsistencyError`: as `teacher_consistency` says.
        `ValueError`: if `teacher_consistency` is none of the four.
    """
    if teacher_consistency not in MODES:
        raise ValueError(f"`teacher_consistency` is one of {', '.join(MODES)}, not {teacher_consistency!r}.")
    own_id = student_fingerprint.id if isinstance(student_fingerprint, TeacherFingerprint) else student_fingerprint
    rows, altered, claimed, dataset = "unverified", (), [], None
    if hasattr(table, "column_names"):
        from ..table.schema import RESIDUAL, column_counts, teacher_counts

        dataset, is_residual = table, RESIDUAL in table.column_names
        rows, altered = check_rows(table, table_name)
        claimed = record_of(table).get("teachers") or []
        sampled_by = column_counts(table, "student_fingerprint")
        table = teacher_counts(table)
        if rows == "altered" and not all(any(same_teacher(t or "", e["id"]) for e in claimed) for t, _ in table):
            why = "has rows of teachers that its record does not name"
            rows, altered = _unverified(table_name, why)
    pairs = [t if isinstance(t, tuple) else (t, None) for t in ([table] if isinstance(table, str) else table)]
    teachers = list(dict.fromkeys(teacher for teacher, _ in pairs))
    judge = _judge_residual if is_residual else _judge_teachers
    verdict = _unusable(student_card, teachers, student, table_name, claimed, rows) or judge(
        student_card, teachers, own_id, student, table_name
    )
    if verdict.consistent:
        entries = [*claimed, *(student_card.get("sft_teachers") or [])]
        readers = [own_id] if own_id else [id for id in sampled_by if id and is_id(id)]
        verdict = _judge_tokens(verdict, teachers, readers, entries, processing_class, dataset, student, table_name)
    if verdict.consistent:
        foreign, unknown = "", []
        if not is_residual:
            foreign, unknown = _judge_domains(pairs, student_card.get("sft_teachers") or [], student, table_name)
        problem, warnings, off_policy = _judge_student(sampled_by, own_id, student, table_name)
        warnings = (*verdict.warnings, *altered, *unknown, *warnings, *_earlier_overrides(student_card, student))
        verdict = replace(verdict, warnings=warnings, rows=rows, off_policy=off_policy)
        if problem := foreign or problem:
            verdict = Verdict(False, None, problem)
    return verdict.enforce(teacher_consistency)


def inherited_teachers(card: dict[str, Any], own_id: str | None) -> list[dict[str, Any]]:
    """
    The SFT teachers of a card, for the card of a model made from this one. Unless the card was written for these very
    weights, what it says of them counts as declared.

    Args:
        card (`dict`): What [`read_model_card`] gives.
        own_id (`str` or `None`): The fingerprint of the weights beside it; `None` if it is not known.
    """
    entries = card.get("sft_teachers") or []
    if written_for(card, own_id):
        return entries
    return [{**entry, "evidence": "declared"} for entry in entries]


def written_for(card: dict[str, Any], own_id: str | None) -> bool:
    """Whether a model's card was written for the weights with this fingerprint, not only beside them."""
    bound_to = (card.get("model") or {}).get("id")
    return bool(own_id and bound_to) and not {WEIGHTS_DIFFER, SCHEMA_DIFFERS} & set(diff_ids(own_id, bound_to))


def _refused(reason: str) -> Verdict:
    return Verdict(False, None, reason)


def _unusable(
    card: dict[str, Any],
    teachers: list[str | None],
    student: str,
    table_name: str,
    claimed: list[dict[str, Any]],
    rows: str,
) -> Verdict | None:
    """
    The refusal of cards that contradict themselves, and of rows of unknown teachers; `None` if there is nothing of
    that. `claimed`, `rows`: what the table's record says of its teachers, and whether it fits.
    """
    entries = card.get("sft_teachers") or []
    if problems := contradictions(f"The card of {student}", entries):
        return _refused(f"{problems[0]} Restore the card, or stamp it again.")
    if problems := contradictions(f"The card of {table_name}", claimed, teachers, rows):
        return _refused(f"{problems[0]} Score the rows again, or {_OVERRIDE}.")

    if not teachers or (unknown := [teacher for teacher in teachers if not (teacher and is_id(teacher))]):
        values = f": {', '.join(map(repr, unknown))}" if teachers else ", which is missing"
        return _refused(
            f"{_capitalized(table_name)} does not say which teacher scored "
            f"{'some of ' if len(teachers) > 1 else ''}its rows (column `teacher_fingerprint`{values}). Score them "
            f"again with a teacher that is fingerprinted, or {_OVERRIDE}."
        )
    return None


def _judge_residual(
    card: dict[str, Any], teachers: list[str], own_id: str | None, student: str, table_name: str
) -> Verdict:
    """The verdict on the teachers of residual scores: any will do, and one that wrote SFT data needs none."""
    entries = card.get("sft_teachers") or []
    wrote = f"was written by {_listed([entry['id'] for entry in entries])}" if entries else "is of unknown teachers"
    reason = (
        f"Residual scores: {table_name} was scored by {_listed(teachers)}, and the recurring part of its scores was "
        f"subtracted (`residualize_table`); the SFT data of {student} {wrote}."
    )
    own = [teacher for teacher in teachers if any(same_teacher(teacher, entry["id"]) for entry in entries)]
    warnings = []
    if own:
        warnings.append(
            f"{_capitalized(table_name)} holds residual scores of {', '.join(own)}, which wrote SFT data of "
            f"{student}: they need no correction. Train on the table that `residualize_table` was given."
        )
    if others := [teacher for teacher in teachers if teacher not in own]:
        warnings.append(
            f"{_capitalized(table_name)} holds residual scores of {', '.join(others)}, which are not those of the "
            f"teacher that wrote the SFT data of {student}. They recover a part of what another teacher's scores "
            "cost; SFT on some answers of that teacher before its scores does better (docs/teacher-consistency.md)."
        )
    return Verdict(True, RESIDUAL_EVIDENCE, reason, tuple(warnings))


def _judge_teachers(
    card: dict[str, Any], teachers: list[str], own_id: str | None, student: str, table_name: str
) -> Verdict:
    """The verdict on the teachers of a table's scores."""
    entries = card.get("sft_teachers") or []
    scored = f"{table_name} was scored by {_listed(teachers)}"
    stamp = f"`trl-lopd stamp {student if ' ' not in student else 'STUDENT'} --sft_teacher TEACHER"
    if not entries:
        return _refused(
            f"The card of {student} names no SFT teacher, and {scored}. If you know which teacher wrote the SFT data, "
            f'declare it, {stamp}`, and train with teacher_consistency="declared_ok"; `TeacherStampCallback` records '
            f"it while you fine-tune. If you do not know, {_OVERRIDE}."
        )
    wrote = f"the SFT data of {student} was written by {_listed([entry['id'] for entry in entries])}"
    behind = {teacher: [e for e in entries if same_teacher(teacher, e["id"])] for teacher in teachers}
    if strangers := [teacher for teacher in teachers if not behind[teacher]]:
        return _refused(
            f"Teacher mismatch: {wrote}, but {table_name} was scored by "
            f"{', '.join(_compared(teacher, entries) for teacher in strangers)}"
            f"{' (and by others that did write it)' if len(strangers) < len(teachers) else ''}. Another teacher's "
            "scores bias the gradient however little the student drifts (Lightning OPD paper: 69.9 -> 63.1 on AIME "
            "2024 at 8B). Score the rollouts again with the SFT teacher, or redo the SFT with data from the scoring "
            f"teacher, or {_OVERRIDE}."
        )

    if own_id is not None and not written_for(card, own_id):
        bound_to = (card.get("model") or {}).get("id")
        binding = f"was written for {bound_to}" if bound_to else "does not say for which weights it was written"
        these = f"these are {own_id}" if own_id else "nothing says which these are"
        return Verdict(
            True,
            "declared",
            f"The card of {student} {binding}, and {these}: what it says of SFT teachers is no more than "
            "declared. (A card copied or written by hand, or weights merged, cast or trained on since.) If it holds "
            f'for these weights, declare it, {stamp} --replace`, and train with teacher_consistency="declared_ok"; '
            f"otherwise {_OVERRIDE}.",
        )
    evidence = {
        teacher: _weakest([evidence_of(teacher), *(e.get("evidence", "declared") for e in behind[teacher])])
        for teacher in teachers
    }
    if declared := [teacher for teacher in teachers if evidence[teacher] == "declared"]:
        return Verdict(
            True,
            "declared",
            f"Teachers agree, but not on computed evidence: {wrote}, and {scored}, and a person's word stands for "
            f'{", ".join(declared)}. teacher_consistency="declared_ok" accepts that.',
        )
    weakest = _weakest(evidence.values())
    return Verdict(True, weakest, f"Teachers agree ({weakest}): {wrote}, and {scored}.")


def _judge_domains(
    pairs: list[tuple[str, str | None]], entries: list[dict[str, Any]], student: str, table_name: str
) -> tuple[str, list[str]]:
    """What forbids training because others wrote the SFT data of a row's domain, and what of that is not known."""
    known = {domain for entry in entries for domain in entry.get("teacher_ids") or ()}
    one_wrote_all = len({content_id(entry["id"]) for entry in entries}) == 1
    foreign, new, undecided = [], [], {domain for _, domain in pairs if domain is None and not one_wrote_all}
    for teacher, domain in pairs:
        own = [entry for entry in entries if same_teacher(teacher, entry["id"])]
        wrote = [entry["id"] for entry in entries if domain in (entry.get("teacher_ids") or ())]
        if domain is None or any(domain in (entry.get("teacher_ids") or ()) for entry in own):
            continue
        if wrote and all(_knows_domains(entry) for entry in own):
            foreign.append(
                f"those of {domain!r} by {teacher}, while {_listed(wrote)} wrote the SFT data of {domain!r}"
            )
        elif known and not wrote:
            new.append(domain)
        elif not one_wrote_all:
            undecided.add(domain)
    if foreign:
        return (
            f"Teacher mismatch: all who scored {table_name} wrote SFT data of {student}, but not of these rows' "
            f"domains (column `teacher_id`): {'; '.join(foreign)}. Another teacher's scores bias the gradient however "
            "little the student drifts. Score those rows again with the teacher that wrote the SFT data of their "
            f"domain, or {_OVERRIDE}."
        ), []
    unknown = []
    if new:
        unknown.append(
            f"{_capitalized(table_name)} has rows of {_quoted(new)}, and the card of {student} names no SFT data of "
            f"{'that domain' if len({*new}) == 1 else 'those domains'}, only of {_quoted(known)}: whether their "
            "teacher is the right one is not known."
        )
    if undecided:
        wrote = _listed(list(dict.fromkeys(entry["id"] for entry in entries)))
        reasons = [f"{table_name} has rows without a `teacher_id`, their domain"] if None in undecided else []
        if not all(map(_knows_domains, entries)):
            reasons.append("its card does not say of all of it of which domain it is (`teacher_ids`)")
        unknown.append(
            f"The SFT data of {student} was written by {wrote}, and {' and '.join(reasons)}: whether each row was "
            "scored by the one that wrote the SFT data of its domain is not checked."
        )
    return "", unknown


def _knows_domains(entry: dict[str, Any]) -> bool:
    """Whether a card says of all rows that a teacher wrote of which domain they are."""
    domains = entry.get("teacher_ids") or {}
    return bool(domains) and entry.get("rows", 0) <= sum(rows or 0 for rows in domains.values())


def _quoted(domains: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted({*domains})))


def _judge_tokens(
    verdict: Verdict,
    teachers: list[str],
    readers: list[str],
    entries: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    table: Dataset | None,
    student: str,
    table_name: str,
) -> Verdict:
    """The verdict, less where a teacher's tokenizer is another than that of those who read the ids."""
    for teacher in teachers:
        about = [entry for entry in entries if same_teacher(teacher, entry["id"])]
        same = {tokenizer_part(teacher), *(part for entry in about for part in entry.get("same_tokens_as") or ())}
        if all(tokenizer_part(reader) in same for reader in readers):
            continue
        unlike = f"{teacher} has another tokenizer than {student} ({', '.join(readers)})"
        differences = None
        if tokenizer is not None and table is not None:
            from .vocabulary import different_tokens, distinct_ids, say, tokenizer_of

            if found := next((found for entry in about if (found := tokenizer_of(entry))), None):
                differences = different_tokens(tokenizer, found[0], distinct_ids(table))
        if differences:
            return Verdict(
                False,
                None,
                f"{unlike}, and scored other text than {student} is trained on: "
                f"{say(differences, 'the student', 'the teacher')}. Score {table_name} with the teacher that shares "
                f"the student's tokenizer, or {_OVERRIDE}.",
            )
        if differences is None:
            reason = (
                f"{unlike}, and nothing tells whether both mean the same by the ids in {table_name}: scoring compares "
                "them where it finds the student's tokenizer or the text of the rows, and notes it in the table's "
                f'record. If they do, teacher_consistency="declared_ok" accepts that; otherwise {_OVERRIDE}.'
            )
            verdict = replace(verdict, evidence="declared", reason=reason)
    return verdict


def _weakest(evidence: Iterable[str]) -> str:
    return max(evidence, key=EVIDENCE.index)


def _earlier_overrides(card: dict[str, Any], student: str) -> list[str]:
    warnings = []
    for i, round in enumerate(card.get("opd_rounds") or [], start=1):
        word = str(round.get("teacher_consistency"))
        if "residual" in round:
            how = "on residual scores"
        elif word == "off" or word.startswith("overridden"):
            how = f"with its teacher consistency check {word}"
        else:
            continue
        warnings.append(
            f"Round {i} of offline OPD of {student} was trained {how}: this student may have learnt from another "
            "teacher's scores."
        )
    return warnings


def _judge_student(
    samplers: Iterable[str | None], own_id: str | None, student: str, table_name: str
) -> tuple[str, list[str], bool]:
    """What forbids training on rollouts of these students, what is to be known of them, and whether they differ."""
    warnings, off_policy, samplers = [], [], list(samplers)
    for sampler in samplers if own_id else ():
        if not (sampler and is_id(sampler)):
            continue  # not known
        differences = diff_ids(own_id, sampler)
        if TOKENIZER_DIFFERS in differences:
            problem = (
                f"{sampler} sampled rollouts of {table_name} with another tokenizer than that of {student} "
                f"({own_id}), so the same token ids may stand for other text. Train with the tokenizer of the one "
                f"that sampled, or sample the rollouts again with this student, or {_OVERRIDE}."
            )
            return problem, [], False
        if TEMPLATE_DIFFERS in differences:
            warnings.append(
                f"{sampler} sampled rollouts of {table_name} under another chat template than that of {student} "
                f"({own_id}): the prompts trained on are not rendered as this student would render them."
            )
        if WEIGHTS_DIFFER in differences:
            off_policy.append(sampler)
    if off_policy:
        in_part = "in part " if len(off_policy) < len(samplers) else ""
        warnings.append(
            f"Off-policy rollouts: {table_name} was sampled {in_part}by {_listed(off_policy, 'checkpoint')}, not by "
            f"{student} ({own_id})."
        )
    return "", warnings, bool(off_policy)


def contradictions(
    where: str, entries: list[dict[str, Any]], teachers: Iterable[str | None] = (), rows: str = "unverified"
) -> list[str]:
    """
    What cannot be true of a card's teachers: digests that do not give their id, domains of other rows than it counts,
    or rows of teachers it does not name.

    Args:
        where (`str`): What messages call the card.
        entries (`list[dict]`): Its teachers.
        teachers (`Iterable[str]`, *optional*): The values of the table's `teacher_fingerprint` column.
        rows (`str`, *optional*): `Verdict.rows` of the table.
    """
    problems = []
    for entry in entries:
        try:
            if "weights" in entry:
                TeacherFingerprint.from_dict(entry)
        except ValueError as error:
            problems.append(f"{where} contradicts itself. {error}")
        of_domains = [rows or 0 for rows in (entry.get("teacher_ids") or {}).values()]
        if min(of_domains, default=0) < 0 or sum(of_domains) > entry.get("rows", sum(of_domains)):
            problems.append(
                f"{where} contradicts itself. It counts {entry.get('rows', 'no')} rows of {entry['id']}, and of its "
                f"domains {json.dumps(entry['teacher_ids'])}."
            )
    named = [teacher for teacher in teachers if teacher and entries]
    unclaimed = [teacher for teacher in named if not any(same_teacher(teacher, entry["id"]) for entry in entries)]
    # Tables without a record may have been joined to it since: then some rows are still of the teachers it names.
    if unclaimed and (rows == "intact" or len(unclaimed) == len(named)):
        problems.append(
            f"{where} says that its rows were scored by {_listed([entry['id'] for entry in entries])}, but they name "
            f"{_listed(unclaimed)}: one of the two was changed by hand."
        )
    return problems


def check_rows(table: Dataset, table_name: str = "the table") -> tuple[str, tuple[str, ...]]:
    """`Verdict.rows` of a table, and a warning unless they are known to be those that were scored."""
    from ..table.schema import TOKEN_COLUMNS, add_digests, rows_digest

    record = record_of(table)
    digests, columns = record.get("digests") or [], record.get("columns") or []
    if not digests:
        return _unverified(
            table_name, "comes without digests of its rows, which `load_table` reads from the card of a table"
        )
    if lost := sorted(set(columns) - set(table.column_names)):
        return _unverified(table_name, f"has lost columns that the digest of its rows covers ({', '.join(lost)})")
    scores = {name for name in TOKEN_COLUMNS if name in table.column_names} - {"completion_mask"}
    if added := sorted(scores - set(columns)):
        return _unverified(table_name, f"has columns that the digest of its rows does not cover ({', '.join(added)})")
    whole = {
        "rows": sum(item["rows"] for item in digests),
        "digest": add_digests(item["digest"] for item in digests),
    }
    digest = rows_digest(table, columns)
    if digest in (whole["digest"], *(item["digest"] for item in digests)):
        return "intact", ()
    # Fewer rows were filtered, more were added: only for the same number is there a table to hold them against.
    same = [item for item in (whole, *digests) if item is whole or item.get("split") == str(table.split)]
    for item in same:
        if item["rows"] == len(table):
            return "altered", (
                f"{_capitalized(table_name)} has as many rows as were scored ({len(table)}), but their "
                f"digest is {digest[:12]}… instead of {item['digest'][:12]}…: since scoring, rows were exchanged, or "
                f"values changed in {', '.join(columns)}.",
            )
    scored = " or ".join(sorted({str(item["rows"]) for item in same}))
    if any(len(table) < item["rows"] for item in same):
        scored += " (a split or a selection has none of its own)"
    return _unverified(table_name, f"has {len(table)} rows, and its digest is that of {scored}")


def _unverified(table_name: str, why: str) -> tuple[str, tuple[str, ...]]:
    return "unverified", (
        f"{_capitalized(table_name)} {why}: whether values were changed since scoring is not checked.",
    )


def _capitalized(name: str) -> str:
    return name[0].upper() + name[1:] if " " in name else f"`{name}`"


def _compared(teacher: str, entries: list[dict[str, Any]]) -> str:
    """A teacher that wrote none of the SFT data, and how it differs from the one of those that is most like it."""
    nearest = min((entry["id"] for entry in entries), key=lambda id: len(diff_ids(teacher, id)))
    return f"{teacher} (beside {nearest}: {', '.join(diff_ids(teacher, nearest))})"


def _listed(ids: list[str], noun: str = "teacher") -> str:
    return f"{len(ids)} {noun}{'s' if len(ids) != 1 else ''} ({', '.join(ids)})"
