"""What all tests share: their environment, and a teacher, a student and a table that nothing changes."""

from __future__ import annotations

import gc
import os

import pytest
import ranks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads cost more than they give on models this small.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Libraries are imported where they are needed: the process that hands out the tests runs none, and would keep those
# that do waiting for its imports.


def pytest_sessionstart(session):
    """Starts one source of ranks for all processes that the tests are handed out to."""
    if session.config.getoption("tx", None) and not hasattr(session.config, "workerinput"):
        ranks.warm()


def pytest_collection_finish():
    """Garbage is collected at the start of every training, which would look for it in all that was imported."""
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    from tiny import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory, tokenizer):
    from tiny import make_model

    path = tmp_path_factory.mktemp("models") / "teacher"
    make_model(seed=1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory, tokenizer, teacher_dir):
    from tiny import make_model, save_student

    return save_student(tmp_path_factory.mktemp("models") / "student", make_model(seed=2), tokenizer, teacher_dir)


@pytest.fixture(scope="session")
def table(teacher_dir, student_dir):
    """Scored rollouts with every optional column but `completion_mask`."""
    from tiny import make_rollouts

    from trl_lopd import score_rollouts

    return score_rollouts(make_rollouts(24), str(teacher_dir), top_k=4, ref_model=str(student_dir))
