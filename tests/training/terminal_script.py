"""Trains in a terminal of 50 lines and 240 columns, and prints what was written to it: `STUDENT TABLE OUT`."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios

from datasets import load_from_disk

from trl_lopd import OfflineOPDConfig, OfflineOPDTrainer


def train(student, table, out):
    rows = load_from_disk(table)
    args = OfflineOPDConfig(
        out, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=4, use_cpu=True, report_to="none",
        bf16=False, save_strategy="no", activation_checkpointing=False,
    )  # fmt: skip
    OfflineOPDTrainer(student, args, rows, eval_dataset=rows).train()


if __name__ == "__main__":
    # Not before it has its size is anything written.
    begin, begun = os.pipe()
    pid, terminal = pty.fork()
    if pid == 0:
        os.read(begin, 1)
        train(*sys.argv[1:])
        sys.exit()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 240, 0, 0))
    os.write(begun, b".")
    written = b""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # how Linux says that nobody has it open any more
            break
        if not chunk:
            break
        written += chunk
    print(written.decode())
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
