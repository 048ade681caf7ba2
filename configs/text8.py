"""Characters of text8 at the size that D3PM, SEDD, MD4 and MDLM published: ar, masked, block4, block8, block16, joint.

    curl -O http://mattmahoney.net/dc/text8.zip && unzip text8.zip && tail -c 5000000 text8 > text8-test.txt
    python -m launch.train --config=configs/text8.py:masked --workdir=runs/text8-masked --set=data.path=text8
    python -m launch.evaluate --workdir=runs/text8-masked --data=text8-test.txt

85M parameters: 12 layers, 12 heads, width 768, rows of 256 characters, batch size 512, 1,000,000 updates. The last
tenth of the file is held out, as in the literature; its second half is the test text. The vocabulary is text8's 27
characters, the 256 bytes and SentencePiece's special tokens.
Hardware and time: not yet run. MD4 reports a day on 16 TPU v5e for its text models (arXiv 2406.04329).
Number to expect, bits per character of the test text: ar 1.23, masked 1.37 (MD4) to 1.40 (MDLM, arXiv 2406.07524);
D3PM's absorbing bound is 1.45. block*, joint: not published, not yet run.
The optimizer is MDLM's for OpenWebText; it has dropout 0.1, which is missing here.
"""

from diffusion_lm.config import Config, Data
from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.objectives.joint import Joint
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
    "joint": Joint(block_size=16),
}


def get_config(kind: str = "masked") -> Config:
    """kind: ar, masked, block4, block8, block16 or joint."""
    if kind not in OBJECTIVES:
        raise ValueError(f"text8: kind {kind!r} is none of {', '.join(OBJECTIVES)}")
    return Config(
        data=Data(path="text8", seq_len=256, val_fraction=0.1, tokenizer_kind="char", vocab_size=512),
        model=DenoiserSpec(width=768, layers=12, heads=12, tie_embeddings=False),
        process=Absorbing(),
        objective=OBJECTIVES[kind],
        optim=AdamW(lr=3e-4, b2=0.999, weight_decay=0.0, schedule=WarmupStableDecay(warmup=2500, decay=0)),
        train=Train(
            steps=1_000_000, batch_size=512, ema_decay=0.9999, log_every=100, eval_every=10_000, eval_batches=20
        ),
        checkpoint=Checkpointing(save_every=10_000),
    )
