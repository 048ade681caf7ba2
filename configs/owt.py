"""OpenWebText at the size of MDLM and BD3-LM: ar, masked, block4, block8, block16.

    python -m launch.train --config=configs/owt.py:masked --workdir=runs/owt-masked --set=data.path=openwebtext.jsonl
    python -m launch.evaluate --workdir=runs/owt-masked

The text is the 8M documents of huggingface.co/datasets/Skylion007/openwebtext as JSON lines with the key "text".
162M parameters: 12 layers, 12 heads, width 768, untied embeddings; rows of 1,024 tokens, batch size 512, 1,000,000
updates: 524B tokens. AdamW at 3e-4, constant after 2,500 updates, no decay; EMA of the parameters at 0.9999 (MDLM's
configs). Hardware and time: not yet run. The tokens take 17 GB in data.token_cache_dir, once for each block size.
Number to expect, published perplexity per token: ar 17.54, masked 22.98, block16 22.27, block8 21.68, block4 20.73
(BD3-LM, arXiv 2503.09573; masked is MDLM, arXiv 2406.07524).
Differences from the papers, all untested:
- Tokens are a SentencePiece unigram model's, not GPT-2's, with the same vocabulary size. Perplexities per token don't
  compare: compare the bits per byte that launch.evaluate reports, or train both kinds here.
- BD3-LM trains with blocks for the last 150,000 updates, after 850,000 of masked diffusion; here blocks are used
  throughout. MDLM has dropout 0.1, and attention across the documents of a row.
- The held-out documents, 1.25 % as in the papers, are chosen by hash and aren't the last 100,000.
"""

from diffusion_lm.config import Config, Data
from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.training.checkpoint import Checkpointing
from diffusion_lm.training.loop import Train
from diffusion_lm.training.optimizer import AdamW, WarmupStableDecay

OBJECTIVES = {
    "ar": AutoregressiveLoss(),
    "masked": ELBO(),
    "block4": BlockELBO(block_size=4),
    "block8": BlockELBO(block_size=8),
    "block16": BlockELBO(block_size=16),
}


def get_config(kind: str = "masked") -> Config:
    """kind: ar, masked, block4, block8 or block16."""
    if kind not in OBJECTIVES:
        raise ValueError(f"owt: kind {kind!r} is none of {', '.join(OBJECTIVES)}")
    objective = OBJECTIVES[kind]
    tokens = f"runs/owt-tokens/{objective.layout.pad + 1}"  # what stands between documents depends on the block
    return Config(
        data=Data(
            path="openwebtext.jsonl", seq_len=1024, val_fraction=0.0125, vocab_size=50_257, token_cache_dir=tokens
        ),
        model=DenoiserSpec(width=768, layers=12, heads=12, tie_embeddings=False),
        process=Absorbing(),
        objective=objective,
        optim=AdamW(lr=3e-4, b2=0.999, weight_decay=0.0, schedule=WarmupStableDecay(warmup=2500, decay=0)),
        train=Train(
            steps=1_000_000, batch_size=512, ema_decay=0.9999, log_every=100, eval_every=10_000, eval_batches=20
        ),
        checkpoint=Checkpointing(save_every=10_000),
    )
