"""launch.sampler_flags: the table of samplers, and flags that don't apply."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import sampler_flags

OWN = sorted({name for kind in sampler_flags.SAMPLERS.values() for name in kind.flags})
VALUES = {"score": "margin", "approximate_cache": "dual", "drafter": "tidar", "threshold": "0.5", "eta": "0.5",
          "churn": "0.5"}  # fmt: skip


def parse(*arguments):
    sampler_flags.FLAGS.parse(arguments)
    sampler_flags.check()


@pytest.mark.parametrize("sampler", sampler_flags.SAMPLERS)
def test_a_flag_that_does_not_apply_is_refused_with_the_samplers_that_take_it(sampler):
    parse(f"--sampler={sampler}")
    for name in OWN:
        argument = f"--{name}={VALUES.get(name, 2)}"
        if name in sampler_flags.SAMPLERS[sampler].flags:
            needed = {"revise_span": "--revise_rounds=1", "cache_block_size": "--approximate_cache=prefix",
                      "cache_refresh_every": "--approximate_cache=delayed"}  # fmt: skip
            parse(f"--sampler={sampler}", argument, *([needed[name]] if name in needed else []))
            continue
        takers = ", ".join(other for other, kind in sampler_flags.SAMPLERS.items() if name in kind.flags)
        with pytest.raises(ValueError, match=f"^--{name} applies to --sampler={takers}; not to {sampler}$"):
            parse(f"--sampler={sampler}", argument)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--sampler=treshold"], "did you mean threshold"),
        (["--sampler=ancestral", "--num_particles=2", "--corrector_steps=1"], "--num_particles goes without"),
        (["--approximate_cache=dual", "--revise_rounds=1"], "--approximate_cache goes without"),
        (["--revise_span=2"], "--revise_span goes with"),
        (["--cache_refresh_every=2"], "goes with --approximate_cache"),
        (["--approximate_cache=delayed", "--cache_block_size=8"], "goes with --approximate_cache=prefix or dual"),
        *(([flag], flag) for flag in ("--cfg_scale=-0.1", "--temperature=-1", "--top_p=2", "--threshold=1.5",
                                      "--eta=-1", "--churn=2", "--denoising_steps=0", "--canvas_length=-1",
                                      "--top_k=-1", "--revise_span=0", "--num_particles=-1", "--corrector_steps=-2")),
    ],
    ids=str,
)  # fmt: skip
def test_contradictions_and_values_out_of_range_are_refused(arguments, cause):
    with pytest.raises(ValueError, match=cause):
        parse(*arguments)


def test_the_help_explains_every_sampler():
    text = next(row.help for row in sampler_flags.FLAGS.rows() if row.name == "sampler")
    assert all(f"{name}: {kind.help}" in text for name, kind in sampler_flags.SAMPLERS.items())


NUMBERS = st.one_of(
    st.integers(-3, 70).map(str),
    st.floats().map(str),
    st.sampled_from(["", "x", "1e9", "-0", "nan", "inf", "0.5", "1"]),
)
FUZZED = [row.name for row in sampler_flags.FLAGS.rows() if row.name != "sampler"]
ENUMS = {"score": ["margin", "entropy"], "approximate_cache": ["prefix", "dual", "delayed"],
         "drafter": ["lookup", "masked", "tidar"], "ignore_eos": ["true", "x"],
         "bad_words": ["a", "", "e"]}  # fmt: skip
MEASURED = ("speculative", "auto")  # they time compiled programs when they are made


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_flags_make_a_sampler_or_one_line(data, model):
    names = data.draw(st.lists(st.sampled_from(FUZZED), max_size=4))
    values = [data.draw(st.sampled_from(ENUMS[name]) if name in ENUMS else NUMBERS) for name in names]
    sampler = data.draw(st.sampled_from([name for name in sampler_flags.SAMPLERS if name not in MEASURED]))
    try:
        parse(f"--sampler={sampler}", *(f"--{name}={value}" for name, value in zip(names, values, strict=True)))
        made = sampler_flags.text_sampler(model, record=False)
        sampler_flags.logits_processor(model)
    except ValueError as error:
        assert str(error) and "\n" not in str(error).strip()
    else:
        assert hash(made) is not None  # programs are compiled for it
