"""Put any method into any model, take it out again, and read and write its files.

A method says of itself what it needs (`Method`); the engine freezes, wraps, refuses, merges and
saves. It knows no single method, holds no mathematics of one, and loads no model.
"""

# ruff: noqa: F401

from .atomic import write_atomically, written_whole
from .files import (
    CONFIG,
    WEIGHTS,
    load_adapter,
    read_adapter,
    refuse_misfit,
    refuse_other_base,
    save_adapter,
    task_type,
)
from .injection import (
    Report,
    attached_to,
    disabled,
    fingerprint,
    freeze,
    inject,
    injected_copy,
    injection_of,
    merge,
    refuse_injected,
    refuse_off,
    report,
    require_injection,
    unload,
    unmerge,
)
from .layer import AdapterLayer, trained_dtype
from .method import (
    ATTACHED,
    Injection,
    Method,
    PeftFiles,
    method_facts,
    register,
    registered,
    registered_methods,
)
from .parameters import blocks_of, chosen_by, last_blocks, own_parameters
from .settings import near_name, refuse_entries, validate
from .targets import (
    find_targets,
    fresh_beyond_head,
    fresh_modules,
    head_of,
    is_classifier,
    is_fresh,
    is_transposed,
    matches,
    one_by_one,
    refuse_packed,
    require_among,
    within,
)
