"""A joint mixture-of-experts model of 25.5B parameters, 4.1B active a token: a shape to compile.

    python -m launch.compile --config=configs/moe_26b_a4b.py --topology=v5p:4x4x8
    python -m launch.train --distributed --config=configs/moe_26b_a4b.py --workdir=runs/moe

25.5B parameters: 30 layers, width 2,816, 48 heads and 8 key-value heads, 128 experts of 704 hidden units, untied
embeddings, vocabulary 262,144. Active for a token are 8 of 128 experts (1.4B of 22.8B), attention (1.2B), the router
and the output embedding (0.7B): 3.4B in matrix products. With the input embedding, a lookup that costs nothing and
isn't counted by `models.flops`, they are 4.1B. Rows of 4,096 tokens, blocks of 32; batch size 1,024, 4 gradient
accumulation steps.
Hardware: 128 chips of v5p, experts over 8: 32 of 95 GiB a chip, compiled only (launch.compile). Time: not yet run.
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
            vocab_size=262_144,
            token_cache_dir="runs/moe_26b_a4b-tokens",
        ),
        model=DenoiserSpec(
            width=2816,
            layers=30,
            heads=48,
            kv_heads=8,
            head_dim=128,
            mlp_dim=704,
            num_experts=128,
            num_experts_per_token=8,
            tie_embeddings=False,
            rope_theta=500_000.0,
        ),
        exec=Execution(remat="full"),
        process=Absorbing(),
        objective=Joint(block_size=32),
        optim=AdamW(lr=2e-4, schedule=WarmupStableDecay(warmup=2000, decay=8000)),
        train=Train(steps=40_000, batch_size=1024, grad_accum_steps=4, log_every=10, eval_every=1000, eval_batches=8),
        checkpoint=Checkpointing(save_every=1000),
        mesh=MeshShape(data=1, fsdp=-1, expert=8),
    )
