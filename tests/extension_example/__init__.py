"""What a user would write: a process, an objective, a corpus, a tokenizer and an optimizer outside diffusion_lm.

python -m launch.train --config=tests/extension_example/config.py --workdir=runs/mine
python -m launch.evaluate --workdir=runs/mine --allow_import=extension_example
"""
