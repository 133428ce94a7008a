"""Python imports this file at start-up when its folder is on PYTHONPATH, in every kernel too."""

import network_guard  # noqa: F401
