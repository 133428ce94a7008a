#!/usr/bin/env bash
# Gradescope runs this once, when it builds the container. uv brings a Python that is new enough.
set -e
apt-get update && apt-get install -y python3-pip
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install uv
python3 /autograder/source/course/course.py setup
