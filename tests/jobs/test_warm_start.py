"""`train.init_from` is looked up once per run: what is pinned stays, whatever its alias names later."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from gru import config as configuration
from gru.config import PipelineConfig
from gru.corpus.dataset import open_dataset
from gru.errors import UserError
from gru.registry import lineage_trace, tracking, versions
from gru.registry.bundle import load_bundle
from gru.registry.lineage import Lineage
from gru.registry.versions import Version
from gru.training import checkpoint as checkpoints
from gru.training.initial_model import digest_at
from jobs import prepare, stages, warm_start
from jobs.entry import JobContext
from jobs.results import PrepareResult
from tests.gru.registry import bundles

CONTEXT = JobContext(None, None, lambda line: None, Namespace())
CHAMPION = 'train.init_from="@champion"'
TABLE = {"name": "crows", "tokenizer": {"kind": "byte"}, "model": bundles.CONFIG.model_dump()}


class Nights:
    """A pipeline whose sources grow and whose models are registered, with weights that nobody trained."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.source = directory / "corpus.txt"
        self.grow()

    def grow(self) -> None:
        text = self.source.read_text() if self.source.exists() else ""
        self.source.write_text(text + "A crow met a fox.\n" * 200)

    def config(self, *overrides: str) -> PipelineConfig:
        corpus = {"sources": [str(self.source)], "heldout": "tail"}
        table = {**TABLE, "storage": str(self.directory / "store"), "corpus": corpus}
        return configuration.load(json.dumps(table), overrides)

    def directory_of(self, config: PipelineConfig) -> str:
        return stages.train_stage(config, self.prepared(config)).directory

    def key_of(self, config: PipelineConfig) -> str:
        return stages.train_stage(config, self.prepared(config)).key

    def prepared(self, config: PipelineConfig) -> PrepareResult:
        return prepare.prepare_dataset(config, CONTEXT)

    def promote(self, config: PipelineConfig, seed: int) -> Version:
        """Register a champion as the result of the run of a pinned configuration."""
        prepared, initial = self.prepared(config), warm_start.initial_model(config)
        tokenizer = open_dataset(prepared["dataset"]).tokenizer()
        lineage = Lineage(
            run="run",
            checkpoint_step=1,
            checkpoint=f"{self.directory_of(config)}/step-000000001-abcdef",
            initial=initial and initial.name,
            initial_digest=initial and initial.digest,
            dataset=prepared["dataset"],
            dataset_digest=prepared["digest"],
            heldout_by=prepared["heldout_by"],
            heldout_share=config.corpus.heldout_share,
            tokenizer_digest=tokenizer.digest,
            sources=[],
            versions={},
        )
        run = tracking.open_run("test", str(seed), "promote")
        bundle = bundles.write(self.directory / f"bundle-{seed}", tokenizer, seed, lineage)
        version = versions.register(run, "crows", bundle, 2.0 - seed, "text")
        assert versions.promote(version, lambda champion: 9.0)[0]
        return version


@pytest.fixture
def nights(tmp_path: Path, mlflow_store: str) -> Nights:
    return Nights(tmp_path)


def test_each_night_starts_from_the_champion_of_the_one_before(nights: Nights) -> None:
    config = nights.config(CHAMPION)
    first = warm_start.pinned(config)
    assert first.train.init_digest == "none" and warm_start.initial_model(first) is None
    assert warm_start.describe(first, None, nights.prepared(first)) == [
        "crows has no earlier @champion: starting from random weights"
    ]
    random = nights.config()
    assert nights.directory_of(first) == nights.directory_of(random), "the same run"
    one = nights.promote(first, seed=1)
    assert warm_start.pinned(first) is first, "what is pinned stays"
    assert warm_start.pinned(config) == first, "the champion is the result of this very run"
    assert warm_start.describe_cached(first, nights.key_of(first)) == (
        "not trained again: it is @champion (crows:1) itself; other text, other settings or "
        'train.init_from = "crows:1" train it further'
    )
    assert warm_start.describe_cached(random, nights.key_of(random)) == "", "a champion was not asked for"

    nights.grow()
    second = warm_start.pinned(config)
    assert (second.train.init_from, second.train.init_digest) == ("crows:1", one.bundle)
    assert warm_start.pinned(second) is second
    prepared = nights.prepared(second)
    initial = warm_start.initial_model(second)
    assert initial is not None and initial.is_stored()
    begin, note = warm_start.describe(second, initial, prepared)
    assert begin == f"starting from crows:1 ({one.bundle[:16]})"
    assert note.startswith("note: the scores may be too good: crows:1 may have been trained on text that is held out")
    assert warm_start.pinned(nights.config('train.init_from="crows:1"')) == second

    two = nights.promote(second, seed=2)
    assert warm_start.pinned(second) is second
    assert warm_start.pinned(config) == second, "the champion is the result of this very run"
    assert "it is @champion (crows:2) itself" in warm_start.describe_cached(second, nights.key_of(second))
    other = warm_start.pinned(nights.config(CHAMPION, "train.seed=1"))
    assert other.train.init_digest == two.bundle, "another run"
    MlflowClient().set_registered_model_alias("crows", versions.CHAMPION, "1")
    assert warm_start.pinned(config) == second
    assert warm_start.describe_cached(second, nights.key_of(second)) == "", "it was trained from the champion"

    links = lineage_trace.trace(two, True, print, lambda path: {}, digest_at)
    [link] = [link for link in links if link.name == "initial"]
    assert (link.state, link.facts) == ("verified", {"name": "crows:1", "digest": one.bundle})
    report = lineage_trace.report("crows:2", lineage_trace.trace(two, False, print, lambda path: {}, digest_at))
    assert f"  initial     found      started from crows:1 ({one.bundle[:16]})" in report.splitlines()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_model_given_by_its_path_is_verified_and_noted(nights: Nights, checkpoint: bool) -> None:
    """A bundle has the held-out share of its dataset, a checkpoint does not."""
    prepared = nights.prepared(nights.config("corpus.heldout=hash"))
    tokenizer = open_dataset(prepared["dataset"]).tokenizer()
    heldout = {"heldout_by": "hash", "heldout_share": 0.01}
    bundle = bundles.write(nights.directory / "b", tokenizer, 5, bundles.LINEAGE.model_copy(update=heldout))
    path = bundle
    if checkpoint:
        path = str(nights.directory / "run" / checkpoints.new_name(7))
        identity = {"tokenizer": tokenizer.digest, "model": bundles.CONFIG.model_dump()}
        average = load_bundle(bundle).model.state_dict()
        checkpoints.save(checkpoints.Checkpoint({"ema": average}, {"step": 7, "identity": identity}), path)
        (nights.directory / "run" / "tokenizer.json").write_bytes(tokenizer.json)
    config = warm_start.pinned(nights.config(f'train.init_from="{path}"'))
    initial = warm_start.initial_model(config)
    assert initial is not None
    now = {**prepared, "heldout_by": "hash"}
    lines = warm_start.describe(config, initial, now)  # type: ignore[arg-type]
    assert lines[0] == f"starting from {path} ({initial.digest[:16]})"
    assert [line.endswith("for it, that is not recorded)") for line in lines[1:]] == [True] * checkpoint

    version = nights.promote(config, seed=1)

    def link(verify: bool) -> lineage_trace.Link:
        links = lineage_trace.trace(version, verify, print, lambda path: {}, digest_at)
        return next(link for link in links if link.name == "initial")

    assert (link(False).state, link(True).state) == ("found", "verified")
    shutil.rmtree(path)
    assert link(True).problem == f"{path} does not exist"
    bundles.write(Path(path), tokenizer, 6)
    assert (link(True).state, link(True).problem.startswith("its digest is ")) == ("different", True)
    (Path(path) / "digests.json").unlink()
    assert link(True).state == "different"


def test_a_model_that_does_not_exist_or_fit_is_refused_in_a_line_that_names_the_key(nights: Nights) -> None:
    def refusal(*overrides: str) -> str:
        with pytest.raises(UserError) as refused:
            warm_start.pinned(nights.config(*overrides))
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert 'train.init_from = "crows@champion": crows' in refusal('train.init_from="crows@champion"')
    assert 'train.init_from = "@best"' in refusal('train.init_from="@best"')
    assert 'train.init_from = "crows:7"' in refusal('train.init_from="crows:7"')
    version = nights.promote(warm_start.pinned(nights.config(CHAMPION)), seed=1)
    nights.grow()
    assert refusal(CHAMPION, "model.hidden=16").startswith("model.hidden = 16: crows:1 (train.init_from) has 8")
    assert refusal(CHAMPION, "tokenizer.kind=word").startswith('tokenizer.kind = "word" is not "byte", the kind of')
    assert refusal(CHAMPION, f"train.init_digest={'0' * 64}") == (
        f"train.init_digest = '{'0' * 64}': that of @champion is {version.bundle}"
    )
