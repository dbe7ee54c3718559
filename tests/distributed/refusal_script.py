"""Makes a trainer of the table of another teacher, and says when a model is loaded all the same."""

from __future__ import annotations

import sys

from datasets import load_from_disk
from effopd_script import begin
from trl import TrlParser

import trl_lopd.training.student
from trl_lopd import OfflineOPDConfig, OfflineOPDTrainer

create_model_from_path = trl_lopd.training.student.create_model_from_path


def create_and_say(*args, **kwargs):
    print("A MODEL WAS LOADED", flush=True)
    return create_model_from_path(*args, **kwargs)


if __name__ == "__main__":
    trl_lopd.training.student.create_model_from_path = create_and_say
    student, table, catch = sys.argv[1:4]
    begin("zero3" if "--deepspeed" in sys.argv else "ddp")
    (args,) = TrlParser((OfflineOPDConfig,)).parse_args_and_config(sys.argv[4:])
    try:
        OfflineOPDTrainer(student, args, load_from_disk(table))
    except trl_lopd.TeacherConsistencyError as error:
        if catch != "catch":
            raise
        print(f"process {args.process_index} of {args.world_size} caught: {str(error)[:16]}", flush=True)
