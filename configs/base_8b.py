"""A joint model of 8.05B parameters, autoregressive and block diffusion, for a large slice of TPUs.

    python -m launch.compile --config=configs/base_8b.py --topology=v6e:16x16
    python -m launch.train --distributed --config=configs/base_8b.py --workdir=runs/8b --set=data.path='text/*.jsonl'

8.05B parameters: 32 layers, width 4,096, 32 heads and 8 key-value heads, MLP 14,336, untied embeddings; vocabulary
131,072; rows of 4,096 tokens, blocks of 32; batch size 1,024 (4 million tokens), 4 gradient accumulation steps, 40,000
updates: 168B tokens, about 20 a parameter (arXiv 2203.15556). Any text will do; its tokens are cached in
data.token_cache_dir.
Hardware: v5p-128 (51.8 of 95 GiB a chip) or v6e-256 (19.0 of 32), compiled only (launch.compile). Time: not yet run.
Number to expect: not yet run. Learning rate and schedule are untuned.
"""

from diffusion_lm.config import Config, Data
from diffusion_lm.models.base import DenoiserSpec, Execution
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.sharding import MeshShape
from diffusion_lm.training.checkpoint import Checkpointing
from diffusion_lm.training.loop import Train
from diffusion_lm.training.optimizer import AdamW, WarmupStableDecay


def get_config() -> Config:
    """This config has one kind."""
    return Config(
        data=Data(
            path="text/*.jsonl",
            seq_len=4096,
            val_fraction=0.001,
            vocab_size=131_072,
            token_cache_dir="runs/base_8b-tokens",
        ),
        model=DenoiserSpec(
            width=4096,
            layers=32,
            heads=32,
            kv_heads=8,
            mlp_dim=14_336,
            tie_embeddings=False,
            rope_theta=500_000.0,
        ),
        exec=Execution(remat="full"),
        process=Absorbing(),
        objective=Joint(block_size=32),
        optim=AdamW(lr=2e-4, schedule=WarmupStableDecay(warmup=2000, decay=8000)),
        train=Train(steps=40_000, batch_size=1024, grad_accum_steps=4, log_every=10, eval_every=1000, eval_batches=8),
        checkpoint=Checkpointing(save_every=1000),
        mesh=MeshShape(data=1, fsdp=-1),
    )
