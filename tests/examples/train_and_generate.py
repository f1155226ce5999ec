# %% [markdown]
# Train a small text generator in this process, read what it writes, and save it. Nothing is downloaded or started: no
# Ray, no MLflow. Open this file in an editor that knows cells (`# %%`), or run it with `python`.

# %%
import argparse
import ast
import inspect
import textwrap

from gru import generate, load_bundle, train

STEPS = 400  # about a minute on two cores

# %% [markdown]
# The text is a list of strings, each a document; one long string does, too. To train on a dataset that `gru run` has
# prepared, pass `gru.open_dataset("store/datasets/...")` instead.

# %%
texts = [inspect.getsource(module) for module in (argparse, ast, inspect, textwrap)]
print(f"{len(texts)} documents, {sum(map(len, texts)):,} characters")

# %% [markdown]
# The settings are the keys of the TOML file's sections; `gru run --help` describes them. A point has the step and the
# metrics that MLflow would show.

# %%
points = []
bundle = train(
    texts,
    tokenizer={"kind": "char"},
    model={"embedding": 128, "hidden": 128},
    train={"steps": STEPS, "batch_size": 16, "sequence_length": 64, "warmup_steps": 10, "heldout_steps": 100},
    progress=points.append,
)

# %% [markdown]
# The loss, in nats per character: on the text that is trained on, and on a document that is held out.

# %%
for point in points:
    if "heldout/loss" in point["metrics"]:
        metrics = point["metrics"]
        print(f"step {point['step']:4}: train {metrics['train/loss']:.3f}, held-out {metrics['heldout/loss']:.3f}")

# %% [markdown]
# Generate, with the text shown as it grows. The same seed gives the same text.

# %%
for piece in generate(bundle, "def ", tokens=200, seed=1, stream=True):
    print(piece, end="", flush=True)
print()

# %% [markdown]
# Save it, load it again, and compare temperatures: a low one repeats what is likely, a high one spells new words.

# %%
bundle.save("my-model")  # also: gru generate my-model
loaded = load_bundle("my-model")
samples = {
    temperature: generate(loaded, "class ", tokens=80, temperature=temperature, seed=1)
    for temperature in (0.3, 0.8, 1.2)
}
for temperature, sample in samples.items():
    print(f"--- {temperature}\nclass {sample}")
