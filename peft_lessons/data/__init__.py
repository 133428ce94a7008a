"""Load what the course runs on: base models, tasks, and whether this computer has all of it.

Nothing here knows a method, and nothing here trains.
"""
