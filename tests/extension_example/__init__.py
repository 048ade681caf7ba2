"""What a user would write outside diffusion_lm: process, objective, sampler, corpus, tokenizer, optimizer.

python -m launch.train --config=tests/extension_example/config.py --workdir=runs/mine
python -m launch.evaluate --workdir=runs/mine --allow_import=extension_example
"""
