# -*- coding: utf-8 -*-
"""Run the course: python course.py COMMAND

Any Python can read this file. An outdated one hands over to a newer one, or says what is missing.
The commands are in peft_lessons/commands.py.
"""

import os
import runpy
import subprocess
import sys

FILE = os.path.realpath(__file__)
# In the order of trust: the tests run on the first and the third of them.
NEWER = [["python3.13"], ["python3.12"], ["python3.11"], ["python3.14"]]
NEWER += [["uv", "run", "--no-project", "--python", "3.13", "python"]]  # downloads it


def hand_over():
    """Run this file with a newer Python instead, if there is one."""
    for python in NEWER:
        try:
            with open(os.devnull, "wb") as nowhere:
                status = subprocess.call(python + ["-c", ""], stdout=nowhere, stderr=nowhere)
            if status == 0:
                os.execvp(python[0], python + [FILE] + sys.argv[1:])
        except OSError:
            pass


if __name__ == "__main__":
    if sys.version_info < (3, 11):
        # `here` is for the Python that runs it, and on Windows `py` chooses the newest one.
        if os.name == "posix" and sys.argv[1:2] != ["here"]:
            hand_over()
        sys.exit(
            "This is Python {}.{}, and the course needs 3.11 or newer: try python3".format(
                *sys.version_info[:2]
            )
        )
    commands = os.path.join(os.path.dirname(FILE), "peft_lessons", "commands.py")
    runpy.run_path(commands, run_name="__main__")
