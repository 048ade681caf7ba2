"""Qwen3-0.6B becomes a diffusion model by fine-tuning on chats alone, as block or masked (dllm's Tiny-A2D).

    python -m launch.convert --source=path/to/Qwen3-0.6B --workdir=runs/qwen3
    python -m launch.train --config=configs/adapt/qwen3_0_6b_a2d.py:block --workdir=runs/a2d \\
        --set=train.init=runs/qwen3 --set=data.path='chats/*.jsonl'

Recipe (examples/a2d of github.com/ZHZisZZ/dllm): rate 1e-4 with cosine, batches of 2,048 chats, 10 epochs of
tulu-3-sft-mixture, smoltalk and the Python parts of opc-sft; blocks of 32, or whole rows; logits of the same position,
not shifted. Rows of 1,024 here hold several chats, so that 256 rows stand for about as many chats; `train.steps` is
for about 2.4M chats: set it to ten times the rows that the log reports, divided by 256.
Hardware: planned for 8 accelerators; not run here. Published for blocks: GSM8K 46.3, HumanEval 46.3; for whole rows
29.3 and 30.5.
Kinds: block is BD3-LM (2503.09573), with clean text read in blocks; masked is MDLM over whole rows (2406.07524).
"""

from diffusion_lm.config import Config
from diffusion_lm.data.prompt_response import PromptResponse
from diffusion_lm.models.base import Execution, FromInit
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.training.checkpoint import Checkpointing
from diffusion_lm.training.loop import Train
from diffusion_lm.training.optimizer import AdamW, WarmupCosine

KINDS = {"block": (BlockELBO(block_size=32), 256), "masked": (ELBO(), 2048)}  # the objective, rows of a batch


def get_config(kind: str = "block") -> Config:
    """kind: one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"qwen3_0_6b_a2d: kind {kind!r} is none of {', '.join(KINDS)}")
    objective, rows = KINDS[kind]
    return Config(
        data=PromptResponse(path="chats.jsonl", chat=True, seq_len=1024, val_fraction=0.001),
        model=FromInit(),
        process=Absorbing(),
        objective=objective,
        exec=Execution(remat="full"),
        optim=AdamW(lr=1e-4, schedule=WarmupCosine(warmup=1200)),
        train=Train(steps=12_000, batch_size=rows, grad_accum_steps=8, eval_every=1000),
        checkpoint=Checkpointing(save_every=1000),
    )
