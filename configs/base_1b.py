"""A joint model of 1.02B parameters, autoregressive and block diffusion, sharded over all devices.

    python -m launch.train --distributed --config=configs/base_1b.py --workdir=runs/1b --set=data.path='text/*.jsonl'

1.02B parameters: 20 layers, width 2,048, 16 heads and 4 key-value heads, untied embeddings; vocabulary 32,768; rows of
2,048 tokens, blocks of 32; batch size 512 (a million tokens), 8 gradient accumulation steps, 20,000 updates: 21B
tokens, about 20 a parameter (arXiv 2203.15556). Each row goes through the network in a clean and a noisy copy, so that
an update costs as much as 2 million tokens: 2.6e20 operations in all. Any text will do; its tokens are cached in
data.token_cache_dir.
Hardware: up to 64 devices; 256 with --set=train.grad_accum_steps=1; compiled only (launch.compile). Time: not yet run.
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
            seq_len=2048,
            val_fraction=0.001,
            vocab_size=32_768,
            token_cache_dir="runs/base_1b-tokens",
        ),
        model=DenoiserSpec(width=2048, layers=20, heads=16, kv_heads=4, tie_embeddings=False),
        exec=Execution(remat="full"),
        process=Absorbing(),
        objective=Joint(block_size=32),
        optim=AdamW(lr=4e-4, schedule=WarmupStableDecay(warmup=1000, decay=4000)),
        train=Train(steps=20_000, batch_size=512, grad_accum_steps=8, log_every=10, eval_every=1000, eval_batches=8),
        checkpoint=Checkpointing(save_every=1000),
        mesh=MeshShape(data=1, fsdp=-1),
    )
