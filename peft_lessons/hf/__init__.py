"""Fine-tune with Hugging Face: PEFT's configurations, `Trainer`, and a command line.

Nothing here uses the course's own methods; the files are the same.
"""
