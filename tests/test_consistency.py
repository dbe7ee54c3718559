from __future__ import annotations

import logging

import pytest

from trl_lopd.consistency import TeacherConsistencyError, Verdict, check_teacher_consistency


def card(*ids):
    return {"sft_teachers": [{"id": teacher} for teacher in ids]}


def judge(record, teachers):
    return check_teacher_consistency(record, teachers, mode="off", student="org/student")


@pytest.mark.parametrize(
    "record, teachers, consistent",
    [
        (card("a@1"), ["a@1"], True),
        (card("a@1"), ["renamed@home@1"], True),
        (card("a@1", "b@2"), ["b@2"], True),
        (card("a@1", "b@2"), ["b@2", "a@1"], True),
        (card("a@1"), "a@1", True),
        (card("a@1"), iter(["a@1"]), True),
        (card("a@1"), ["a@2"], False),
        (card("a@1"), ["a@1", "b@2"], False),
        (card(), ["a@1"], False),
        ({}, ["a@1"], False),
        ({"sft_teachers": None}, ["a@1"], False),
        ({"opd_teachers": [{"id": "a@1"}]}, ["a@1"], False),
        (card("a@1"), [], False),
        (card("a@1"), [None], False),
        (card("a@1"), ["a@1", ""], False),
        (card("a@1"), ["a@"], False),
        ({}, [], False),
    ],
)
def test_rule(record, teachers, consistent):
    assert judge(record, teachers).consistent is consistent


def test_agreement_names_both():
    reason = judge(card("a@1"), ["b@1"]).reason
    assert "org/student was written by 1 teacher (a@1)" in reason and "scored by 1 teacher (b@1)" in reason


def test_no_stamp_says_how_to_record_it():
    reason = judge({}, ["a@1"]).reason
    assert "card of org/student names no SFT teacher" in reason and "scored by 1 teacher (a@1)" in reason
    assert "trl_lopd.stamp_model_card(dir, sft_teachers=[fingerprint_teacher(teacher)])" in reason
    assert 'teacher_consistency="warn" or "off"' in reason


def test_mismatch_names_counts_explains_and_advises():
    reason = judge(card("a@1"), ["a@1", "b@2", "c@3"]).reason
    assert "org/student was written by 1 teacher (a@1)" in reason
    assert "scored by 3 teachers (a@1, b@2, c@3)" in reason
    assert "2 of 3 scoring teachers did not write it: b@2, c@3." in reason
    assert "bias the gradient however little the student drifts" in reason
    assert "69.9 -> 63.1 on AIME 2024 at 8B" in reason
    for remedy in ("Score the rollouts again", "redo the SFT", 'teacher_consistency="warn" or "off"'):
        assert remedy in reason
    assert "same name" not in reason


def test_mismatch_under_one_name_says_so():
    assert (
        "a: same name, but the weights, the tokenizer or the chat template differ"
        in judge(card("a@1"), ["a@2"]).reason
    )


def test_rows_without_a_teacher():
    assert "does not say which teacher scored its rows" in judge(card("a@1"), [None]).reason
    reason = judge(card("a@1"), ["b@2", None]).reason
    assert "some of its rows" in reason and "(b@2)" in reason and "(a@1)" in reason


def test_strict_raises_the_reason():
    expected = judge({}, ["a@1"]).reason
    for kwargs in ({}, {"mode": "strict"}):
        with pytest.raises(TeacherConsistencyError) as raised:
            check_teacher_consistency({}, ["a@1"], student="org/student", **kwargs)
        assert str(raised.value) == expected
    assert issubclass(TeacherConsistencyError, ValueError)


@pytest.mark.parametrize("mode, records", [("warn", 1), ("off", 0)])
def test_warn_and_off(caplog, mode, records):
    with caplog.at_level(logging.DEBUG):
        verdict = check_teacher_consistency({}, ["a@1"], mode=mode)
    assert not verdict.consistent and len(caplog.records) == records
    assert all(
        (r.name, r.levelname, r.getMessage()) == ("trl_lopd.consistency", "WARNING", verdict.reason)
        for r in caplog.records
    )


@pytest.mark.parametrize("mode", ["strict", "warn", "off"])
def test_agreement_is_silent_in_every_mode(caplog, mode):
    assert check_teacher_consistency(card("a@1"), ["a@1"], mode=mode).consistent
    assert not caplog.records


def test_unknown_mode():
    with pytest.raises(ValueError, match="'lax'.*strict, warn, off") as raised:
        check_teacher_consistency(card("a@1"), ["a@1"], mode="lax")
    assert not isinstance(raised.value, TeacherConsistencyError)


def test_verdict_is_frozen():
    with pytest.raises(AttributeError):
        Verdict(True, "").consistent = False
