"""A joint model of 126M parameters, autoregressive and block diffusion: a night on a small slice of TPUs.

    python -m launch.compile --config=configs/base_125m.py --topology=v5e:2x4
    python -m launch.train --config=configs/base_125m.py --workdir=runs/125m --set=data.path='text/*.jsonl'

126M parameters: 12 layers, width 768, 12 heads and 4 key-value heads, untied embeddings; vocabulary 32,768; rows of
2,048 tokens, blocks of 32; batch size 128 (a quarter of a million tokens), 10,000 updates: 2.6B tokens, about 20 a
parameter (arXiv 2203.15556). Any text will do; its tokens are cached in data.token_cache_dir.
Hardware: 8 chips of 16 GB, compiled only (launch.compile). Time: not yet run.
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
            token_cache_dir="runs/base_125m-tokens",
        ),
        model=DenoiserSpec(width=768, layers=12, heads=12, kv_heads=4, tie_embeddings=False),
        exec=Execution(remat="full"),
        process=Absorbing(),
        objective=Joint(block_size=32),
        optim=AdamW(lr=1e-3, schedule=WarmupStableDecay(warmup=500, decay=2000)),
        train=Train(steps=10_000, batch_size=128, log_every=10, eval_every=1000, eval_batches=8),
        checkpoint=Checkpointing(save_every=1000),
        mesh=MeshShape(data=1, fsdp=-1),
    )
