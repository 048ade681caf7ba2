"""Supervised fine-tuning from a trained run: the loss on held-out answers falls, and the lowest is kept."""

import json

import numpy as np

import diffusion_lm as dlm
from diffusion_lm.models.base import FromInit
from diffusion_lm.training import metrics


def test_answers_are_learned(trained, model, tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"Line {i}:", "completion": " the owl sat on the cat."} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = dlm.PromptResponse(path=str(path), seq_len=64, val_fraction=0.2)
    base = str(trained[0] / "work")
    config = dlm.Config(
        data=data,
        model=FromInit(),
        process=dlm.Absorbing(),
        objective=dlm.Joint(block_size=16),
        optim=dlm.AdamW(lr=1e-2, schedule=dlm.WarmupCosine(warmup=1)),
        train=dlm.Train(init=base, steps=9, batch_size=8, eval_every=3, eval_batches=99, early_stopping_patience=2),
    )
    result = dlm.train(config, tmp_path / "work")
    held_out = [row for row in metrics.read(tmp_path / "work") if "valid/causal" in row]
    assert [row["step"] for row in held_out] == [0, 3, 6, 9] and result.best_step == 9
    assert held_out[-1]["valid/causal"] < held_out[0]["valid/causal"] - 0.5
    before, after = dlm.evaluate(model, data), dlm.evaluate(dlm.load(tmp_path / "work"))
    assert before.tokens == after.tokens > 0
    for found, row in ((before, held_out[0]), (after, held_out[-1])):
        np.testing.assert_allclose(found.parts["causal"].nats_per_token, row["valid/causal"], rtol=2e-3)
