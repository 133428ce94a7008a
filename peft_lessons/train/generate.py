"""Let a language model continue a text."""

import torch


def generate_text(model, tokenizer, opening: str, seed: int = 0, tokens: int = 40) -> str:
    """Continue `opening` by up to `tokens` tokens, with temperature 0.7 and top-p 0.9.

    The same seed gives the same text; the global random state does not change."""
    ids = tokenizer(opening, return_tensors="pt").to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        written = model.generate(
            **ids, do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=tokens
        )
    return tokenizer.decode(written[0], skip_special_tokens=True)
