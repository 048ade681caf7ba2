"""LLaDA-8B-Base learns to answer, at the setting of its paper (2502.09992, section 2.3 and appendix B).

    python -m launch.convert --source=path/to/LLaDA-8B-Base --workdir=runs/llada
    python -m launch.train --config=configs/adapt/llada_8b_sft.py --workdir=runs/llada_sft \\
        --set=train.init=runs/llada --set=data.path='pairs/*.jsonl'

Recipe (figures from memory of the paper, not read again here): 4.5M pairs, 3 epochs, batches of 256, rate 2.5e-5 held
after 50 updates of warmup and over the last tenth brought down to 2.5e-6, weight decay 0.1. Prompts are clean, an
answer is followed by ends of text to the end of its row, a chat of several turns is one example for each answer. LLaDA
fills up to the longest row of a batch and divides each row's loss by its answer's length, ends included; here a row has
one length, and a batch's nats are divided by its answers' tokens, so that the value stays a bound.
Hardware: planned for a v5p-64 or more; not run here.
"""

from diffusion_lm.config import Config
from diffusion_lm.data.prompt_response import PromptResponse
from diffusion_lm.models.base import Execution, FromInit
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.training.checkpoint import Checkpointing
from diffusion_lm.training.loop import Train
from diffusion_lm.training.optimizer import AdamW, WarmupStableDecay


def get_config() -> Config:
    """3 epochs of 4.5M pairs in batches of 256."""
    return Config(
        data=PromptResponse(path="pairs.jsonl", chat=True, seq_len=1024, val_fraction=0.0005),
        model=FromInit(),
        process=Absorbing(),
        objective=ELBO(),
        exec=Execution(remat="full"),
        optim=AdamW(lr=2.5e-5, weight_decay=0.1, schedule=WarmupStableDecay(warmup=50, decay=5300, final=0.1)),
        train=Train(steps=53_000, batch_size=256, grad_accum_steps=8, eval_every=2000),
        checkpoint=Checkpointing(save_every=2000),
    )
