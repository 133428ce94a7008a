"""A run whose newest checkpoint was cut short resumes from the one before."""

import pytest
from tiny import tiny_llama

import peft_lessons
from peft_lessons import setup_peft_training, train_with_peft
from peft_lessons.hf import trainer


def test_the_checkpoint_before_the_newest_is_kept(tmp_path, monkeypatch):
    base, out = str(tmp_path / "base"), tmp_path / "out"
    tiny_llama(vocab_size=4096).save_pretrained(base)
    peft_lessons.load_tokenizer("tinylm").save_pretrained(base)
    model, tokenizer = setup_peft_training(base, "lora", out, rank=4)
    step = trainer.PeftTrainer.training_step

    def stop(self, *args, **more):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **more)

    monkeypatch.setattr(trainer.PeftTrainer, "training_step", stop)
    options = dict(output_dir=out, steps=8, checkpoint_every=2, show=False)
    with pytest.raises(KeyboardInterrupt):
        train_with_peft(model, tokenizer, ["The sea is calm."] * 4, **options)
    # Trainer writes this file last; a system that fails may lose what it wrote just before.
    (out / "checkpoint-4" / "trainer_state.json").unlink()
    assert trainer._checkpoint(out, resume=True, steps=8).name == "checkpoint-2"
