"""Qwen2.5-1.5B learns canvases beside its next token, at TiDAR's setting (2511.08923).

    python -m launch.convert --source=path/to/Qwen2.5-1.5B --workdir=runs/qwen2.5
    python -m launch.train --config=configs/adapt/qwen2_5_1_5b_joint.py --workdir=runs/qwen_joint \\
        --set=train.init=runs/qwen2.5 --set=data.path='text/*.jsonl'

Recipe: continued pretraining on 50B tokens, rate 1e-5 to 3e-6 by cosine, 2M tokens a batch, both losses with weight 1,
a causal clean half with shifted labels and a noisy half without, blocks of 16. TiDAR masks all of a block; here a time
is drawn for each, so that the noisy half is a bound (2503.09573) and canvases can be written in any number of passes.
Hardware: planned for a v5p-64 or more; not run here. Published: 7.45 tokens a pass, 4.7 times the tokens a second.
Fine-tuning on chats afterwards: data=PromptResponse(...), as in smollm2_sft.py.
"""

from diffusion_lm.config import Config, Data
from diffusion_lm.models.base import Execution, FromInit
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.training.checkpoint import Checkpointing
from diffusion_lm.training.loop import Train
from diffusion_lm.training.optimizer import AdamW, WarmupCosine


def get_config() -> Config:
    """512 rows of 4,096: 2M tokens a batch, 24,000 of them."""
    return Config(
        data=Data(path="text.jsonl", seq_len=4096, val_fraction=0.0005),
        model=FromInit(),
        process=Absorbing(),
        objective=Joint(block_size=16),
        exec=Execution(remat="full"),
        optim=AdamW(lr=1e-5, schedule=WarmupCosine(warmup=500, final=0.3)),
        train=Train(steps=24_000, batch_size=512, grad_accum_steps=4, eval_every=1000),
        checkpoint=Checkpointing(save_every=1000),
    )
