"""Say what training costs: measured here, estimated for any model, and which method to choose.

Nothing here trains a model for its result; `measure` takes single steps.
"""
