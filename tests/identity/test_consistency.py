"""The rule, on ids alone; what it says of real models and tables is in `test_chain.py`."""

from __future__ import annotations

import logging

import pytest

from trl_lopd.identity.consistency import (
    TeacherConsistencyError,
    Verdict,
    check_teacher_consistency,
    inherited_teachers,
)


def fid(name="teacher", weights=1, tokenizer=2, template=3, evidence=""):
    return f"{name}@1-{weights:012x}-{tokenizer:08x}-{template:08x}{evidence}"


A, B, C = fid("a", weights=1), fid("b", weights=2), fid("c", weights=3)


def card(*ids, evidence="verified", **more):
    return {"sft_teachers": [{"id": teacher, "evidence": evidence} for teacher in ids], **more}


def judge(record, teachers, own=None):
    return check_teacher_consistency(
        record, teachers, student_fingerprint=own, teacher_consistency="off", student="org/student"
    )


@pytest.mark.parametrize(
    "record, teachers, consistent",
    [
        (card(A), [A], True),
        (card(A), [A.replace("a@", "renamed@home@")], True),
        (card(A, B), [B], True),
        (card(A, B), [B, A], True),
        (card(A), A, True),
        (card(A), iter([A]), True),
        (card(A), [B], False),
        (card(A), [A, B], False),
        (card(), [A], False),
        ({}, [A], False),
        ({"sft_teachers": None}, [A], False),
        ({"opd_rounds": [{"teachers": [{"id": A}]}]}, [A], False),
        (card(A), [], False),
        (card(A), [None], False),
        (card(A), [A, ""], False),
        (card(A), ["a@"], False),
        (card(A), ["Qwen3-32B"], False),
        ({}, [], False),
    ],
)
def test_rule(record, teachers, consistent):
    verdict = judge(record, teachers)
    assert verdict.consistent is consistent
    assert verdict.evidence == ("verified" if consistent else None)


@pytest.mark.parametrize(
    "in_card, in_table, weakest",
    [
        ("verified", "", "verified"),
        ("verified", "#probed", "probed"),
        ("probed", "", "probed"),
        ("probed", "#declared", "declared"),
        ("declared", "", "declared"),
        ("declared", "#probed", "declared"),
    ],
)
def test_the_weakest_link_is_the_evidence_and_the_mode_says_what_is_enough(in_card, in_table, weakest):
    verdict = judge(card(A, evidence=in_card), [A + in_table])
    assert verdict.consistent and verdict.evidence == weakest
    assert verdict.accepted("strict") is (weakest != "declared")
    assert all(verdict.accepted(mode) for mode in ("declared_ok", "warn", "off"))
    assert ("declared_ok" in verdict.reason) is (weakest == "declared")


def test_the_weakest_of_several_teachers_and_of_several_entries_decides():
    entries = [{"id": A, "evidence": "verified"}, {"id": B, "evidence": "declared"}]
    assert judge({"sft_teachers": entries}, [A]).evidence == "verified"
    verdict = judge({"sft_teachers": entries}, [A, B])
    assert verdict.evidence == "declared" and f"a person's word stands for {B}." in verdict.reason
    # A few rows known to be a teacher's say nothing of the many declared to be.
    twice = [{"id": A, "evidence": "declared", "rows": 3000}, {"id": A, "evidence": "verified", "rows": 64}]
    assert judge({"sft_teachers": twice}, [A]).evidence == "declared"


def test_an_entry_that_does_not_say_how_it_is_known_is_declared():
    assert judge({"sft_teachers": [{"id": A}]}, [A]).evidence == "declared"


def test_agreement_names_both():
    reason = judge(card(A), [A]).reason
    assert f"org/student was written by 1 teacher ({A})" in reason and f"scored by 1 teacher ({A})" in reason


def test_no_stamp_says_how_to_record_it():
    reason = judge({}, [A]).reason
    assert "card of org/student names no SFT teacher" in reason and f"scored by 1 teacher ({A})" in reason
    assert "trl-lopd stamp org/student --sft_teacher TEACHER" in reason and "TeacherStampCallback" in reason
    assert 'teacher_consistency="warn" or "off"' in reason


def test_mismatch_names_counts_explains_and_advises():
    reason = judge(card(A), [A, B, C]).reason
    assert f"org/student was written by 1 teacher ({A})" in reason
    assert f"scored by {B} (beside {A}: the weights differ), {C} (beside" in reason
    assert "and by others that did write it" in reason and "by others" not in judge(card(A), [B]).reason
    assert "bias the gradient however little the student drifts" in reason
    assert "69.9 -> 63.1 on AIME 2024 at 8B" in reason
    for remedy in ("Score the rollouts again", "redo the SFT", 'teacher_consistency="warn" or "off"'):
        assert remedy in reason


@pytest.mark.parametrize(
    "other, words",
    [
        (fid(weights=9), "the weights differ"),
        (fid(tokenizer=9), "the tokenizer differs"),
        (fid(template=9), "the chat template differs"),
        (fid(weights=9, template=9), "the weights differ, the chat template differs"),
    ],
)
def test_mismatch_says_in_words_what_differs_from_the_nearest_teacher(other, words):
    far = fid("far", weights=5, tokenizer=5, template=5)
    reason = judge(card(far, fid()), [other]).reason
    assert f"{other} (beside {fid()}: {words})" in reason


@pytest.mark.parametrize("value", [None, "", "gpt-4", "a@0123456789abcdef", "a@1-0-0-0", A + "#sworn"])
def test_rows_whose_teacher_is_not_known(value):
    reason = judge(card(A), [value]).reason
    assert f"does not say which teacher scored its rows (column `teacher_fingerprint`: {value!r})" in reason
    assert f"scored some of its rows (column `teacher_fingerprint`: {value!r})" in judge(card(A), [A, value]).reason
    assert "which is missing" in judge(card(A), []).reason


def test_a_card_only_declares_unless_it_was_written_for_these_weights():
    bound = card(A, model={"id": fid("student", weights=7)})
    assert judge(bound, [A], own=fid("renamed", weights=7)).evidence == "verified"
    # The template of a checkpoint may be edited: its SFT data stays what it was.
    assert judge(bound, [A], own=fid("student", weights=7, template=8)).evidence == "verified"
    verdict = judge(bound, [A], own=fid("student", weights=7, tokenizer=8))
    assert verdict.evidence == "declared" and "nothing tells whether both mean the same" in verdict.reason
    verdict = judge(bound, [A], own="")
    assert verdict.evidence == "declared" and "nothing says which these are" in verdict.reason
    assert judge(bound, [A]).evidence == "verified"
    verdict = judge(bound, [A], own=fid("student", weights=8))
    assert verdict.consistent and verdict.evidence == "declared"
    assert "was written for student@1-000000000007" in verdict.reason and "card copied" in verdict.reason
    assert "trl-lopd stamp org/student --sft_teacher TEACHER --replace" in verdict.reason
    verdict = judge(card(A), [A], own=fid("student", weights=8))
    assert verdict.evidence == "declared" and "does not say for which weights" in verdict.reason


def test_what_is_inherited_is_verified_only_from_a_card_written_for_these_weights():
    own = fid("student", weights=7)
    bound = card(A, model={"id": own})
    assert inherited_teachers(bound, own) == bound["sft_teachers"]
    for record, id in ((bound, fid("student", weights=8)), (bound, None), (card(A), own)):
        assert [t["evidence"] for t in inherited_teachers(record, id)] == ["declared"]
    assert inherited_teachers({}, own) == []


@pytest.mark.parametrize("word, warned", [("overridden (warn)", True), ("off", True), ("verified", False)])
def test_an_earlier_round_without_its_check_is_warned_of(word, warned):
    rounds = {"opd_rounds": [{"teacher_consistency": "verified"}, {"teacher_consistency": word}]}
    verdict = judge({**card(A), **rounds}, [A])
    assert verdict.evidence == "verified" and bool(verdict.warnings) is warned
    assert not warned or "Round 2 of offline OPD of org/student was trained with its teacher" in verdict.warnings[0]


def test_ids_of_the_students_stand_in_for_the_table():
    own = fid("student", weights=7)
    kwargs = {"student_fingerprint": own, "teacher_consistency": "off"}
    assert not check_teacher_consistency(card(A), [A], sampled_by=[None, own, "mine"], **kwargs).warnings
    assert check_teacher_consistency(card(A), [A], sampled_by=[fid("s", weights=8)], **kwargs).off_policy
    assert not check_teacher_consistency(
        card(A), [A], sampled_by=[fid("s", weights=7, tokenizer=8)], **kwargs
    ).consistent


def test_a_record_whose_digests_do_not_give_its_id_is_refused():
    forged = {"id": A, "evidence": "verified", "weights": "0" * 64, "tokenizer": "1" * 64, "chat_template": "2" * 64}
    verdict = judge({"sft_teachers": [forged]}, [A])
    assert not verdict.consistent and "The card of org/student contradicts itself" in verdict.reason


def wrote(teacher, rows=None, **domains):
    """An entry of a card: rows of each domain, those of `unknown` without one."""
    total = rows if rows is not None else sum(domains.values())
    domains.pop("unknown", None)
    return {"id": teacher, "evidence": "verified", "rows": total, **({"teacher_ids": domains} if domains else {})}


BY_DOMAIN = [wrote(A, math=6), wrote(B, code=4)]
RIGHT, SWAPPED, ALL_A = [(A, "math"), (B, "code")], [(B, "math"), (A, "code")], [(A, "math"), (A, "code")]
NOT_CHECKED = "SFT data of its domain is not checked"


@pytest.mark.parametrize(
    "entries, pairs, refused, warned",
    [
        (BY_DOMAIN, RIGHT, None, None),
        (BY_DOMAIN, [(A.replace("a@", "renamed@"), "math")], None, None),
        (
            BY_DOMAIN,
            SWAPPED,
            f"'math' by {B}, while 1 teacher ({A}) wrote the SFT data of 'math'; those of 'code'",
            None,
        ),
        (BY_DOMAIN, ALL_A, f"those of 'code' by {A}, while 1 teacher ({B}) wrote", None),
        (BY_DOMAIN, [*RIGHT, (B, "math")], f"those of 'math' by {B}", None),
        # Both wrote some of a domain: either may score it.
        ([wrote(A, math=6, code=1), wrote(B, code=4)], [*RIGHT, (A, "code")], None, None),
        # One teacher for both: nobody else can have written it.
        ([wrote(A, math=6, code=4)], ALL_A, None, None),
        ([wrote(A, math=6), wrote(A, code=4)], ALL_A, None, None),
        ([wrote(A, rows=9)], ALL_A, None, None),
        ([wrote(A, math=9)], [(A, None)], None, None),
        ([wrote(A, math=9)], [(B, "math")], "Teacher mismatch: the SFT data", None),
        # What is not known is said.
        (BY_DOMAIN, [A, B], None, NOT_CHECKED),
        (BY_DOMAIN, [(A, "math"), (B, None)], None, "the table has rows without a `teacher_id`"),
        ([wrote(A, rows=6), wrote(B, rows=4)], SWAPPED, None, "does not say of all of it of which domain it is"),
        ([wrote(A, rows=6), wrote(B, rows=4)], [A], None, NOT_CHECKED),
        ([wrote(A, math=6), wrote(B, rows=4)], RIGHT, None, "names no SFT data of that domain, only of 'math'"),
        ([wrote(A, math=6), wrote(B, rows=4)], [(A, "math")], None, None),
        ([wrote(A, math=6), wrote(B, rows=4)], [(B, "math")], None, NOT_CHECKED),
        ([wrote(A, math=6, unknown=1), wrote(B, code=4)], ALL_A, None, NOT_CHECKED),
        (
            BY_DOMAIN,
            [*RIGHT, (B, "law")],
            None,
            "rows of 'law', and the card of org/student names no SFT data of that",
        ),
        ([wrote(A, math=6)], [(A, "law")], None, "only of 'math'"),
        # Declared by a person, without numbers.
        ([{"id": A, "teacher_ids": {"math": None}}, {"id": B, "teacher_ids": {"code": None}}], RIGHT, None, None),
        (
            [{"id": A, "teacher_ids": {"math": None}}, {"id": B, "teacher_ids": {"code": None}}],
            SWAPPED,
            f"by {B}",
            None,
        ),
        # Forged.
        ([wrote(A, rows=3, math=6), wrote(B, code=4)], RIGHT, "contradicts itself. It counts 3 rows of", None),
        ([wrote(A, math=9, code=-3), wrote(B, code=4)], RIGHT, "contradicts itself. It counts 6 rows of", None),
    ],
)
def test_each_row_is_held_against_the_teachers_of_its_domain(entries, pairs, refused, warned):
    verdict = judge({"sft_teachers": entries}, pairs)
    assert verdict.consistent is (refused is None)
    assert refused is None or refused in verdict.reason
    assert bool(verdict.warnings) is (warned is not None)
    assert warned is None or warned in " ".join(verdict.warnings)


def test_strict_raises_the_reason():
    expected = judge({}, [A]).reason
    for kwargs in ({}, {"teacher_consistency": "strict"}, {"teacher_consistency": "declared_ok"}):
        with pytest.raises(TeacherConsistencyError) as raised:
            check_teacher_consistency({}, [A], student="org/student", **kwargs)
        assert str(raised.value) == expected
    assert issubclass(TeacherConsistencyError, ValueError)


def test_strict_refuses_what_is_only_declared_and_declared_ok_takes_it():
    declared = card(A, evidence="declared")
    with pytest.raises(TeacherConsistencyError, match="declared_ok"):
        check_teacher_consistency(declared, [A])
    assert check_teacher_consistency(declared, [A], teacher_consistency="declared_ok").consistent


@pytest.mark.parametrize("mode, records", [("warn", 1), ("off", 0)])
@pytest.mark.parametrize("record", [{}, card(A, evidence="declared")])
def test_warn_and_off(caplog, mode, records, record):
    with caplog.at_level(logging.DEBUG):
        verdict = check_teacher_consistency(record, [A], teacher_consistency=mode)
    assert not verdict.accepted("strict") and len(caplog.records) == records
    assert all(
        (r.name, r.levelname, r.getMessage()) == ("trl_lopd.identity.consistency", "WARNING", verdict.reason)
        for r in caplog.records
    )


@pytest.mark.parametrize("mode", ["strict", "declared_ok", "warn", "off"])
def test_agreement_is_silent_in_every_mode(caplog, mode):
    assert check_teacher_consistency(card(A), [A], teacher_consistency=mode).consistent
    assert not caplog.records


def test_unknown_mode():
    with pytest.raises(ValueError, match="is one of strict, declared_ok, warn, off, not 'lax'") as raised:
        check_teacher_consistency(card(A), [A], teacher_consistency="lax")
    assert not isinstance(raised.value, TeacherConsistencyError)


def test_verdict_is_frozen():
    with pytest.raises(AttributeError):
        Verdict(True, None, "").consistent = False
